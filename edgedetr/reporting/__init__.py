"""The report of a verified bundle: tables, figures and one HTML page; it runs no model."""
