"""Process rewards in a rollout: the token of each step, with special tokens, thoughts and forced tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.errors import UserError
from align.models.built_in import make_tiny_tokenizer
from align.rl.rollout import STEP_REWARDS, Rollout
from align.rl.scores import last_token, place_steps, refuse_steps, score_rollout
from align.scoring.functions import FunctionScorer
from align.scoring.scored import StepScore

TOKENIZER: Any = make_tiny_tokenizer()


def make_rollout(*texts: str, thought: int = 0, forced: tuple[int, ...] = ()) -> Rollout:
    """Responses of one token per byte and an end token; the first ``thought`` characters are a thought."""
    ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id] for text in texts]
    width = max(map(len, ids))
    mask = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        mask[row, : len(tokens)] = True
    mask[:, list(forced)] = False
    tensors = {"response_mask": mask, "finished": torch.ones(len(ids), dtype=torch.bool)}
    if thought:
        tensors |= {"thought_end": torch.tensor([thought] * len(ids)), "open_thought": torch.tensor([False] * len(ids))}
    rows = [{"id": str(number)} for number in range(len(ids))]
    return Rollout(0, rows, list(range(len(ids))), [[1]] * len(ids), ids, list(texts), tensors)


def placed(rollout: Rollout, *steps: list[StepScore]) -> list[dict[int, float]]:
    rewards = place_steps(rollout, steps, TOKENIZER)
    return [{i: value for i, value in enumerate(row) if value} for row in rewards.tolist()]


def test_step_reward_is_on_the_last_token_of_the_step() -> None:
    # "ab\n\ncd": the steps end with tokens 1 and 5; the end token 6 earns nothing here. Shorter rows are padded.
    rollout = make_rollout("ab\n\ncd", "x")
    assert placed(rollout, [StepScore(2, 1.0), StepScore(6, 2.0)], [StepScore(1, 3.0)]) == [{1: 1.0, 5: 2.0}, {0: 3.0}]


def test_step_that_ends_within_a_token_has_that_token() -> None:
    # Four bytes are one character: it is there with the last of its tokens.
    ids = TOKENIZER("a😀b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    assert [last_token(ids, end, TOKENIZER) for end in (1, 3)] == [0, 5]
    # A tokenizer with one token for "ab" and the line feed after it.
    words = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(["ab\n", "\ncd", ""][i] for i in ids))
    assert [last_token([0, 1, 2], end, words) for end in (2, 6)] == [0, 1]


def test_steps_of_an_answer_follow_its_thought() -> None:
    rollout = make_rollout("<think>\n\n</think>ab cd", thought=len("<think>\n\n</think>"))
    start = len("<think>\n\n</think>")
    assert placed(rollout, [StepScore(2, 1.0), StepScore(5, 2.0)]) == [{start + 1: 1.0, start + 4: 2.0}]


def test_forced_token_earns_nothing() -> None:
    assert placed(make_rollout("abcd", forced=(1,)), [StepScore(2, 1.0)]) == [{0: 1.0}]
    assert placed(make_rollout("abcd", forced=(0,)), [StepScore(1, 1.0)]) == [{1: 1.0}]


def test_sampler_scores_steps_and_places_them() -> None:
    rollout = make_rollout("ab cde", "f")
    scorer = FunctionScorer("f", lambda rows, texts: [[len(s) for s in text.split()] for text in texts], separator=" ")
    steps = score_rollout(rollout, scorer).steps
    assert steps is not None
    assert rollout.tensors["scores"].tolist() == [5.0, 1.0]
    assert rollout.tensors["score_steps"].tolist() == [2.0, 1.0]
    assert place_steps(rollout, steps, TOKENIZER).tolist() == [[0, 2, 0, 0, 0, 3, 0], [1, 0, 0, 0, 0, 0, 0]]


def test_method_with_one_advantage_refuses_steps() -> None:
    rollout = make_rollout("a")
    refuse_steps(rollout, "grpo", False)
    rollout.tensors[STEP_REWARDS] = torch.zeros(1, 2)
    refuse_steps(rollout, "ppo", True)
    with pytest.raises(UserError, match="grpo: the scorer returns a score for each step"):
        refuse_steps(rollout, "grpo", False)
