"""Checkpoint folders: found, read, checked, converted, packaged, loaded."""
