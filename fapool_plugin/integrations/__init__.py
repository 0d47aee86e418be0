"""Adapters: each host framework has one home here and is imported nowhere else."""
