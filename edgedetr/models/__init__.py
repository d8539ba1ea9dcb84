"""The family: every member by name, as a frozen configuration and the function that builds it."""
