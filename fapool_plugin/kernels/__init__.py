"""Exact attention of rectangles of the attention matrix, forward and backward."""
