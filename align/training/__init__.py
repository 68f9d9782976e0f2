"""Supervised and preference training on trl's trainers: rows, arguments, order, progress, checkpoints."""
