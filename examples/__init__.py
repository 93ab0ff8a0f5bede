"""Models built with this package's own commands."""
