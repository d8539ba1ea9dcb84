"""What stands between backbone and queries: necks and encoders."""
