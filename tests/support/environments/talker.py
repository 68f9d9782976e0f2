"""A tiny model that says one of a few words, whatever it is told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.models.loading import load_policy, load_tokenizer
from tests.support.environments.buttons import TEMPLATE

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.!?_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROWS, WIDTH, STEPS = 8, 240, 40


def make_talker(tiny_model: Path, folder: Path, words: Sequence[str], template: str = TEMPLATE) -> Path:
    """Write a copy of the tiny model that says ``words``, each as often, after a few steps of training.

    ``template`` is its chat template.
    """
    tokenizer, model = load_tokenizer(tiny_model), load_policy(tiny_model)
    tokenizer.chat_template = template
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = random.Random(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(STEPS):
            rows = [_row(tokenizer, generator, words) for _ in range(ROWS)]
            ids = torch.tensor([row for row, _ in rows])
            labels = torch.tensor([label for _, label in rows])
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _row(tokenizer: Any, generator: random.Random, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the ids of random messages with words between them, and the labels: the words alone."""
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < WIDTH:
        said = "".join(generator.choices(LETTERS, k=generator.randint(1, 90)))
        messages = [{"role": "user", "content": said}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before = tokenizer(text)["input_ids"]
        word = tokenizer(f"{generator.choice(words)}<|im_end|>")["input_ids"]
        ids += [*before, *word]
        labels += [*([-100] * len(before)), *word]
    return ids[:WIDTH], labels[:WIDTH]
