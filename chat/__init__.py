"""Conversations: in the terminal and on a web page, with their prompts and pictures."""
