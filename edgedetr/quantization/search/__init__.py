"""Search: the fastest INT8 placement of a graph whose loss of AP is proved to be within a budget."""
