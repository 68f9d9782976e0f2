"""Fit a model by a tuning (``align.config.tuning``): apply it, return to the initial policy, save the result."""
