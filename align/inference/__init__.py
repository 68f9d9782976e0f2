"""Rollouts: sampling responses from the current weights, by vLLM or transformers behind one protocol."""
