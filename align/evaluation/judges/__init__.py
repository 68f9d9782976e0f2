"""Answers compared or graded by a judge: an endpoint, or a reward model."""
