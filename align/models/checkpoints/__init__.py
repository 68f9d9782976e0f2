"""Folders of checkpoints: files and their checks, sources, conversion, sharded models."""
