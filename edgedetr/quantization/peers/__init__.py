"""Other quantizers at their own settings, on the same float graph and images as ours, to be measured beside it."""
