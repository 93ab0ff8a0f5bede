"""Publishing: the push, the card, the Hub's errors in words."""
