"""The side that owns the model: decides, asks pool ranks, computes its own share, merges."""
