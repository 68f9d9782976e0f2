"""Estimators of memory and work, one module for each family of stage kinds. A stage's record names its module."""
