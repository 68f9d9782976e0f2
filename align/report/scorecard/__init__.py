"""Sections of a page that come from an evaluation: numbers in tables, in figures and in sentences."""
