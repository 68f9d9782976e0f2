"""Scores checkpoints: generation, scoring, drift from a reference, statistics, the scorecard."""
