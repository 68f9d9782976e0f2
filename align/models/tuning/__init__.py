"""Fit a model by a tuning (``align.config.tuning``): apply it, return to the initial policy, save the result."""

LOW, HIGH, SCALE = ".low", ".high", ".scale"
"""Endings of the names of a matrix's low-rank update: A (r, in), B (out, r), and the factor of their product."""
