"""The side that owns nothing: holds keys, computes shares, answers."""
