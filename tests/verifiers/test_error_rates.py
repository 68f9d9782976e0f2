"""Error rates of the grader of mathematics on pairs that were written before the grader was opened.

``math_pairs.jsonl`` has references, responses, and whether a reader accepts the response. Pairs of the other tests and
of the corpus of attacks are not among them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.verifiers.mathematics import verify
from align.verifiers.verdict import BadReference

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_pairs.jsonl").read_text("utf-8").splitlines()]


def accepts(reference: str, response: str) -> bool:
    try:
        return verify(reference, response).score == 1
    except BadReference:
        return False


@pytest.mark.parametrize(("is_right", "highest_share"), [(True, 0.15), (False, 0.05)])
def test_share_of_wrong_judgments_is_small(is_right: bool, highest_share: float) -> None:
    pairs = [pair for pair in PAIRS if pair["right"] is is_right]
    wrong = [pair for pair in pairs if accepts(pair["reference"], pair["response"]) is not is_right]
    assert len(pairs) >= 60
    assert len(wrong) / len(pairs) <= highest_share, wrong
