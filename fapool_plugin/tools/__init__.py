"""Commands for people. Nothing imports them."""
