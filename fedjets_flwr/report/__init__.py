"""Showing a run: plots and one HTML page."""
