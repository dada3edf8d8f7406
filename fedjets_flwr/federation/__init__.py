"""Many clients' replies -> one state."""
