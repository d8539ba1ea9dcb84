"""Where queries start, and how they are selected."""
