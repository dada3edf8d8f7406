"""Data sets, partitions and augmentation."""
