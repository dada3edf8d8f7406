"""Architectures, the common expert and the gate."""
