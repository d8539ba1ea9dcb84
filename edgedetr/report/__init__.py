"""The report page: reads results, measures nothing."""
