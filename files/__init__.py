"""Read files that others wrote, and write our own files whole or not at all."""
