"""Query selectors: learned queries, and two-stage selection in the memory."""
