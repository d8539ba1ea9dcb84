"""The report: tables, figures and one HTML page; it runs no model."""
