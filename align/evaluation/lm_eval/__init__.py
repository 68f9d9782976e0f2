"""Benchmarks that run inside lm-eval, in a separate process."""
