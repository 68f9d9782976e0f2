"""Benchmarks that run inside lm-eval, in a process of its own."""
