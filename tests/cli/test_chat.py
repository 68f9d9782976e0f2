"""The chat loop: turns remembered and forgotten, replies made harmless, every way out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from align.cli import chat as module
from align.cli.chat import Speaker, chat
from align.errors import UserError


class Echo:
    """Stands for the model: says how many turns it saw."""

    seen: list[list[str]]

    def __init__(self, folder: Path, temperature: float, max_tokens: int) -> None:
        type(self).seen = []

    def reply(self, turns):  # type: ignore[no-untyped-def]
        self.seen.append([turn["content"] for turn in turns])
        yield f"{len(turns)} "
        if turns[-1]["content"] == "interrupt":
            raise KeyboardInterrupt
        yield "turns"


def _talk(monkeypatch: pytest.MonkeyPatch, lines: str, **options: str) -> tuple[int, str]:
    monkeypatch.setattr(module, "Speaker", Echo)
    out = io.StringIO()
    return chat(Path("x"), stdin=io.StringIO(lines), stdout=out, **options), out.getvalue()


def test_remembers_resets_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = _talk(monkeypatch, "one\ntwo\n/reset\nthree\n\n/what\n/exit\nnever\n", system="be brief")
    assert code == 0
    assert Echo.seen == [
        ["be brief", "one"],
        ["be brief", "one", "2 turns", "two"],
        ["be brief", "three"],
    ]
    assert "(forgotten)" in out
    assert out.count("/reset forgets") == 2  # at the start, and for the unknown command


def test_interrupted_reply_is_kept_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = _talk(monkeypatch, "interrupt\nnext\n")  # ends with the input
    assert code == 0
    assert Echo.seen[-1] == ["interrupt", "1 ", "next"]
    assert " …" in out


def test_a_real_model_streams_what_it_would_say_at_once(tiny_model: Path) -> None:
    speaker = Speaker(tiny_model, temperature=0, max_tokens=12)
    pieces = list(speaker.reply([{"role": "user", "content": "Hi"}]))
    assert "".join(pieces) == "".join(speaker.reply([{"role": "user", "content": "Hi"}]))
    long = [{"role": "user", "content": "x" * 900}, {"role": "assistant", "content": "y" * 900}]
    kept = speaker._prompt([{"role": "system", "content": "S"}, *long, {"role": "user", "content": "z" * 900}])
    assert kept.shape[1] < 1000
    assert "S" in speaker.tokenizer.decode(kept[0])


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        chat(tmp_path, stdin=io.StringIO(""), stdout=io.StringIO())
