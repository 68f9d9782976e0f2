"""The objective of online DPO: the pairs it selects, its loss and what it logs, worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.stages.best_of_n import OnlineDpoConfig
from align.rl.objectives.selection import OnlineDPOObjective
from align.rl.rollout import Rollout

CONFIG = OnlineDpoConfig.for_trainer(learning_rate=1e-6, beta=0.5)


def make_batch() -> dict[str, torch.Tensor]:
    """Return two pairs and a tie; responses have two tokens, of which the third response's last is padding."""
    return {
        "ref_logprobs": torch.zeros(6, 2),
        "decided": torch.tensor([True] * 4 + [False] * 2)[:, None],
        "learn_mask": torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1], [1, 1]]).bool(),
    }


def test_logged_values_are_means_over_pairs() -> None:
    objective = OnlineDPOObjective(CONFIG)
    logprobs = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, 9.0], [1.0, 2.0], [5.0, 5.0], [0.0, 0.0]])
    batch = make_batch()
    step: Any = SimpleNamespace(count=objective.token_count([batch]))
    assert step.count == 2
    loss = objective.loss({"logprobs": logprobs}, batch, step)
    # Drifts 2 against 0, and -1 against 3: margins 0.5 * 2 = 1 and 0.5 * -4 = -2.
    # -log s(1) = 0.313262 and -log s(-2) = 2.126928; the tie counts for nothing.
    assert float(loss) == pytest.approx((0.313262 + 2.126928) / 2, abs=1e-5)
    means = objective.averages.means(lambda totals: totals)
    assert means == pytest.approx({"accuracy": 0.5, "margin": -0.5, "pair_loss": 1.220095}, abs=1e-5)


def test_best_and_worst_of_each_group_are_a_pair() -> None:
    """The second group ties, and in the third an environment failed, which leaves two judged responses."""
    scores = [0.2, 0.9, -0.5, 1.0, 1.0, 1.0, 0.0, 3.0, 1.0]
    rollout = Rollout(
        update=0,
        rows=[{} for _ in scores],
        groups=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        prompts=[[1]] * 9,
        responses=[[number] for number in range(9)],
        texts=[str(number) for number in range(9)],
        tensors={
            "scores": torch.tensor(scores),
            "finished": torch.ones(9, dtype=torch.bool),
            "response_mask": torch.ones(9, 1, dtype=torch.bool),
            "failed": torch.tensor([False] * 6 + [True, False, False]),
        },
    )
    objective = OnlineDPOObjective(CONFIG)
    pairs = objective.select(rollout, sampler=None)  # type: ignore[arg-type]
    assert pairs.texts[:2] == ["1", "2"] and pairs.texts[4:] == ["7", "8"]
    assert set(pairs.texts[2:4]) <= {"3", "4", "5"} and pairs.texts[2] != pairs.texts[3]
    assert pairs.tensors["decided"].flatten().tolist() == [True, True, False, False, True, True]
    assert objective.averages.means(lambda totals: totals) == {"tied_pairs": pytest.approx(1 / 3)}
