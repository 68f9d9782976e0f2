"""Faster forward passes with equal results: ragged rows, shared prefixes, shared lower layers, lean norms."""
