"""Verifiable functions by import path."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.user_functions import function_identity
from align.data import checkers
from align.data.embedded import generate
from align.data.scoring import function_scorer
from align.errors import UserError


def test_gold_by_short_and_long_name() -> None:
    rows = generate(3, 0)
    replies = [row["completion"][0]["content"] for row in rows]
    assert function_scorer("gold").score(rows, replies) == [1.0, 1.0, 1.0]
    assert function_scorer("align.data.checkers:gold").score(rows, ["", "", ""], [True] * 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("golden", "expected 'gold' or 'module:name'.*Did you mean 'gold'"),
        ("align.data.chekers:gold", "no module 'align.data.chekers'"),
        ("align.data.checkers:gsm8k_anser", "no function 'gsm8k_anser'.*'gsm8k_answer'"),
        ("no_such_package_here.x:y", "no module"),
    ],
)
def test_bad_paths(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        function_scorer(path)


def test_a_users_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_scores.py").write_text(
        "def length(rows, responses): return [len(r) for r in responses]\n"
        "def short(rows, responses): return []\n"
        "def nan(rows, responses): return [float('nan')]\n"
    )
    row = {"id": "7", "checks": ""}
    assert function_scorer("my_scores:length").score([row], ["abc"]) == [3.0]
    with pytest.raises(UserError, match="0 scores for 1 responses"):
        function_scorer("my_scores:short").score([row], ["abc"])
    with pytest.raises(UserError, match="nan for row 7"):
        function_scorer("my_scores:nan").score([row], ["abc"])
    before = function_identity("my_scores:length")
    (tmp_path / "my_scores.py").write_text("def length(rows, responses): return [1.0]\n")
    assert function_identity("my_scores:length") != before
    assert function_identity("gold") == f"align.data.checkers:gold version {checkers.VERSION}"
