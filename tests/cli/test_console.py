"""What a run prints: closing lines, hostile text made harmless, rates and time left."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from align.capacity.memory import Choice, Estimate, Memory
from align.cli.console import ConsoleListener, duration, memory_lines
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind

NODE: Any = SimpleNamespace(name="one", stage=STAGES["evaluate"])


def listener(terminal: bool = False) -> tuple[ConsoleListener, io.StringIO]:
    out = io.StringIO()
    return ConsoleListener([NODE], Console(file=out, force_terminal=terminal, width=200, highlight=False)), out


def artifact(kind: str, metrics: dict[str, Any]) -> Artifact:
    record = {"kind": kind, "metrics": metrics, "seconds": 75.0, "peak_memory_bytes": 3 * 2**30}
    return Artifact("one", Kind.SCORECARD, Path(), record)


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42s"), (185, "3m 05s"), (7800, "2h 10m"), (0, "0s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_closing_line_has_time_memory_and_what_was_measured() -> None:
    console_listener, out = listener()
    values = {"sft": {"gold": 0.25}, "dpo": {"gold": 0.375}}
    console_listener.stage_done(NODE, artifact("evaluate", {"reward_accuracy": 0.71, "values": values}))
    assert out.getvalue() == "✓ one   1m 15s   3.0 GiB  RM accuracy 0.71  sft 0.25  dpo 0.375\n"


def test_what_was_not_measured_is_not_shown() -> None:
    console_listener, out = listener()
    console_listener.stage_done(
        NODE, artifact("evaluate", {"reward_accuracy": None, "values": {"sft": {"gold": 0.25}}})
    )
    assert "None" not in out.getvalue() and "RM accuracy" not in out.getvalue()


def test_text_from_a_model_or_a_file_can_neither_steer_the_terminal_nor_the_markup() -> None:
    console_listener, out = listener(terminal=True)
    console_listener.stage_event(NODE, {"event": "warning", "message": "bad\x1b[2Jrow [bold]x[/bold] \x07"})
    assert "bad\\x1b[2Jrow [bold]x[/bold] \\x07" in out.getvalue()


def test_a_note_is_a_line_of_its_own() -> None:
    console_listener, out = listener()
    console_listener.stage_event(NODE, {"event": "note", "message": "lora r16: 5 of 100 parameters are trained (5 %)"})
    assert out.getvalue() == "· one  lora r16: 5 of 100 parameters are trained (5 %)\n"


def test_rates_and_time_left_count_from_this_attempts_first_event() -> None:
    console_listener, _ = listener()
    first = {"time": 100.0, "done": 10, "total": 40, "tokens": 1000}
    event = {"time": 110.0, "done": 20, "total": 40, "unit": "steps", "tokens": 4000, "loss": 1.5}
    assert console_listener._status(event, first) == "20/40 steps · 300 tok/s · loss 1.5 · 20s left"


GIB = 2**30


def choices(unit: int) -> Estimate:
    small = Memory(weights=unit, gradients=0, optimizer=unit // 2, activations=unit // 1000)
    large = Memory(weights=2 * unit, gradients=0, optimizer=unit, activations=None)
    options = (Choice({"tuning": "lora r8", "critic": "head"}, small, False),
            Choice({"tuning": "full", "critic": "policy"}, large, True))  # fmt: skip
    return Estimate(1_234_567_890, options, ("One note.",))


def test_memory_is_a_table_of_what_is_there_with_the_chosen_row_marked() -> None:
    assert memory_lines("ppo", choices(GIB)) == [
        "ppo: memory of a process in GiB, counted for 1,234.6 million parameters",
        "     tuning   critic  policy  AdamW  in all  + per 1k tokens",
        "     lora r8  head      1.00   0.50    1.50             1.00",
        "  *  full     policy    2.00   1.00    3.00        not known",
        "  One note.",
    ]


def test_a_model_of_a_few_megabytes_is_told_in_mib() -> None:
    lines = memory_lines("ppo", choices(2**20))
    assert "in MiB" in lines[0] and "1.50" in lines[2]


def test_memory_that_is_not_known_says_why_in_one_line() -> None:
    assert memory_lines("ppo", "no \x1b[2Jrule") == ["ppo: memory not known: no \\x1b[2Jrule."]
