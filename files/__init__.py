"""Reading strangers' files and writing our own: whole or not at all."""
