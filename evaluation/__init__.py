"""Questions in, answers and metrics out."""
