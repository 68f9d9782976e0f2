"""Token log-probabilities against one plain forward pass; KL by hand."""

import math
from pathlib import Path

import pytest
import torch

from align.evaluation import logprobs as module
from align.evaluation.logprobs import response_logprobs, sequence_kl
from align.models.loading import load_policy


def test_matches_a_plain_forward_pass_whatever_the_batches(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_policy(tiny_model)
    prompts = [[5, 9, 7], [8, 4, 6, 30, 31], [20]]
    responses = [[40, 41, 2], [50], [60, 61, 62, 63, 64, 65]]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0].float() / 0.7
        table = torch.log_softmax(logits, dim=-1)
        expected.append([table[len(prompt) - 1 + at, token].item() for at, token in enumerate(response)])
    for batch_tokens in (4096, 10, 1):
        monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
        found = response_logprobs(model, prompts, responses, temperature=0.7, precision="float32", pad=3)
        for got, want in zip(found, expected, strict=True):
            assert got == pytest.approx(want, abs=1e-4)


def test_kl_by_hand():
    # p = (0.5, 0.25), q = (0.25, 0.5): log ratios log 2 and -log 2
    k1, k3 = sequence_kl([math.log(0.5), math.log(0.25)], [math.log(0.25), math.log(0.5)])
    assert k1 == pytest.approx(0)
    # (0.5 - 1 + log 2) + (2 - 1 - log 2)
    assert k3 == pytest.approx(0.5)


def test_kl_of_a_policy_to_itself_is_zero():
    assert sequence_kl([-1.0, -2.0], [-1.0, -2.0]) == (0, 0)


def test_k1_estimates_the_true_kl():
    torch.manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    picks = torch.multinomial(p, 20_000, replacement=True)
    k1, k3 = zip(*(sequence_kl([p[i].log().item()], [q[i].log().item()]) for i in picks), strict=True)
    truth = (p * (p / q).log()).sum().item()
    assert sum(k1) / len(k1) == pytest.approx(truth, abs=0.02)
    assert sum(k3) / len(k3) == pytest.approx(truth, abs=0.02)
    assert min(k3) >= 0
