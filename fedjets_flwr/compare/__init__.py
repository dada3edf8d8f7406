"""Rows x seeds -> one table."""
