"""Datasets: sources, formats, splits, the embedded generator, its checkers, preference pairs."""
