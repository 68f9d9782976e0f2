"""Synthetic data: new instructions, responses, the best of several, and on-policy pairs."""
