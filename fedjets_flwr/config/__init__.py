"""Every setting, typed and checked once."""
