"""The chat loop: turns are kept and cleared, replies are escaped, every way out works."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from align.cli.chat import chat
from tests.support.refusals import Refused


class Echo:
    """Replaces the model: replies with the number of turns."""

    conversations: list[list[str]]

    def __init__(self, folder: Path, temperature: float, max_tokens: int) -> None:
        type(self).conversations = []

    def reply(self, turns):  # type: ignore[no-untyped-def]
        self.conversations.append([turn["content"] for turn in turns])
        yield "", f"{len(turns)} "
        if turns[-1]["content"] == "interrupt":
            raise KeyboardInterrupt
        yield "", "turns"


def _talk(monkeypatch: pytest.MonkeyPatch, lines: str, **options: str) -> tuple[int, str]:
    monkeypatch.setattr("align.inference.replier.Replier", Echo)
    out = io.StringIO()
    return chat(Path("x"), stdin=io.StringIO(lines), stdout=out, **options), out.getvalue()


def test_remembers_resets_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = _talk(monkeypatch, "one\ntwo\n/reset\nthree\n\n/what\n/exit\nnever\n", system="be brief")
    assert code == 0
    assert Echo.conversations == [
        ["be brief", "one"],
        ["be brief", "one", "2 turns", "two"],
        ["be brief", "three"],
    ]
    assert "(cleared)" in out
    assert out.count("/reset clears") == 2  # at the start, and for the unknown command


def test_interrupted_reply_is_kept_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = _talk(monkeypatch, "interrupt\nnext\n")  # ends with the input
    assert code == 0
    assert Echo.conversations[-1] == ["interrupt", "1 ", "next"]
    assert " …" in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_thoughts_are_dim_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces = (("<think>", ""), ("a\x1b[0m", ""), ("</think>", "Y"), ("", "es"))

    class Thinker(Echo):
        def reply(self, turns):  # type: ignore[no-untyped-def]
            yield from pieces

    monkeypatch.setattr("align.inference.replier.Replier", Thinker)
    terminal, file = Terminal(), io.StringIO()
    for output in (terminal, file):
        chat(Path("x"), stdin=io.StringIO("hi\n"), stdout=output)
    # The model's own escape is shown, not obeyed.
    dim = "\x1b[2m<think>\x1b[0m\x1b[2ma\\x1b[0m\x1b[0m\x1b[2m</think>\x1b[0mYes"
    assert dim in terminal.getvalue()
    assert "<think>a\\x1b[0m</think>Yes" in file.getvalue() and "\x1b" not in file.getvalue()


def test_folder_without_a_model(refused: Refused, tmp_path: Path) -> None:
    refused(lambda: chat(tmp_path, stdin=io.StringIO(""), stdout=io.StringIO()))
