"""Validation of a score on answers whose order is known, before a stage learns from it."""
