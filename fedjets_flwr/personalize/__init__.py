"""A site's own model."""
