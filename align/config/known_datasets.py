"""Benchmarks that are known by name, and the place of each on the Hub. Torch-free."""

from __future__ import annotations

KNOWN_DATASETS: dict[str, dict[str, str]] = {
    "arc_challenge": {"dataset": "allenai/ai2_arc", "config": "ARC-Challenge", "split": "test"},
    "arc_easy": {"dataset": "allenai/ai2_arc", "config": "ARC-Easy", "split": "test"},
    "gsm8k": {"dataset": "openai/gsm8k", "config": "main", "split": "test"},
    "ifbench": {"dataset": "allenai/IFBench_test", "split": "train"},
    "ifeval": {"dataset": "google/IFEval", "split": "train"},
    "mmlu": {"dataset": "cais/mmlu", "config": "all", "split": "test"},
    "mt_bench": {"dataset": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
    "truthfulqa": {"dataset": "truthfulqa/truthful_qa", "config": "generation", "split": "validation"},
    "xstest": {"dataset": "walledai/XSTest", "split": "test"},
}
"""Name → owner and name, configuration and split on the Hub."""
