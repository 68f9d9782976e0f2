"""Merge several checkpoints of one base model: the maths, lazy reading of their weights, and checks."""
