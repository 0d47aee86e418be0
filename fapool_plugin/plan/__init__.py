"""Who computes what, and what it takes: numbers only, no tensors."""
