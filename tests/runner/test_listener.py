"""What a run prints: closing lines, hostile text made harmless, rates and time left."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from align.capacity.memory import Choice, Estimate, Memory
from align.cli.plan_hardware import memory_lines
from align.pipeline.context import duration
from align.pipeline.registry import STAGES
from align.runner.listener import ConsoleListener, RunningStage
from align.store.artifacts import Artifact, Kind

NODE: Any = SimpleNamespace(name="one", stage=STAGES["evaluate"])


def listener(terminal: bool = False) -> tuple[ConsoleListener, io.StringIO]:
    out = io.StringIO()
    return ConsoleListener([NODE], Console(file=out, force_terminal=terminal, width=200, highlight=False)), out


def artifact(kind: str, metrics: dict[str, Any]) -> Artifact:
    record = {"kind": kind, "metrics": metrics, "seconds": 75.0, "peak_memory_bytes": 3 * 2**30}
    return Artifact("one", Kind.SCORECARD, Path(), record)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (42.4, "42s"),
        (185, "3m 05s"),
        (7800, "2h 10m"),
        (0, "0s"),
        (59.7, "1m 00s"),
        (119.7, "2m 00s"),
        (3599.6, "1h 00m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_stage_with_an_alarm_ends_with_no_tick() -> None:
    console_listener, out = listener()
    console_listener.stage_done(NODE, artifact("sft", {"alarms": ["step 12: divergence"]}))
    assert out.getvalue().startswith("! one ") and "alarms: step 12: divergence" in " ".join(out.getvalue().split())


def test_closing_line_has_the_reasons_of_a_score_of_0() -> None:
    console_listener, out = listener()
    node: Any = SimpleNamespace(name="one", stage=STAGES["grpo"])
    reasons = ["32 of 32: no_answer; `math` reads a box: ask for one in the prompt"]
    console_listener.stage_done(node, artifact("grpo", {"score_last": 0.0, "score_reasons": reasons}))
    assert "→ 0  32 of 32: no_answer; `math` reads a box" in out.getvalue()


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


def test_evaluation_without_a_score_shows_its_first_numbers() -> None:
    console_listener, out = listener()
    values = {"sft": {"gsm8k.accuracy": 0.25, "gsm8k.unparsed": 0.5}, "base": {"gsm8k.accuracy": 0.125}}
    console_listener.stage_done(NODE, artifact("evaluate", {"values": values}))
    assert out.getvalue().endswith("sft gsm8k.accuracy 0.25  base gsm8k.accuracy 0.125\n")


def test_no_time_is_left_after_the_last_unit() -> None:
    stage = RunningStage()
    for done, at in ((39, 0.0), (40, 5.0)):
        stage.pace.update({"done": done, "total": 40, "unit": "steps", "time": at})
    stage.phase = "scoring held-out rows"
    assert "left" not in stage.report(6.0) and "40/40 steps" in stage.report(6.0)


def test_foreign_text_is_escaped_on_the_console() -> None:
    console_listener, out = listener(terminal=True)
    console_listener.stage_event(NODE, {"event": "warning", "message": "bad\x1b[2Jrow [bold]x[/bold] \x07"})
    assert "bad\\x1b[2Jrow [bold]x[/bold] \\x07" in out.getvalue()


def test_a_note_is_a_line_of_its_own() -> None:
    console_listener, out = listener()
    console_listener.stage_event(NODE, {"event": "note", "message": "lora r16: 5 of 100 parameters are trained (5 %)"})
    assert out.getvalue() == "· one  lora r16: 5 of 100 parameters are trained (5 %)\n"


def test_a_stage_that_stops_says_so_at_once() -> None:
    console_listener, out = listener()
    console_listener.stage_stopping(NODE, "stopping now")
    assert out.getvalue() == "… one  stopping now\n"


def progress(seconds: float, done: float, total: float, unit: str = "steps", **shown: Any) -> dict[str, Any]:
    return {"event": "progress", "time": seconds, "done": done, "total": total, "unit": unit, **shown}


def test_rates_count_from_this_attempt_s_first_event() -> None:
    stage = RunningStage(started=90.0)
    stage.pace.update(progress(100.0, 10, 40, tokens=1000))
    stage.pace.update(progress(110.0, 20, 40, tokens=4000, loss=1.5))
    assert stage.status() == "20/40 steps · 20s left · 300 tok/s · loss 1.5"


@pytest.mark.parametrize(("done", "rate"), [(30, "3 responses/s"), (5, "30 responses/min")])
def test_stage_without_tokens_shows_the_rate_of_its_unit(done: int, rate: str) -> None:
    stage = RunningStage(started=0.0)
    stage.pace.update(progress(0.0, 0, 60, "responses"))
    stage.pace.update(progress(10.0, done, 60, "responses"))
    assert rate in stage.status()


def test_each_work_of_a_stage_has_its_own_rate() -> None:
    """An evaluation samples for minutes and then scores: the scores' rate does not count the sampling."""
    stage = RunningStage(started=0.0)
    stage.pace.update(progress(0.0, 0, 600, "responses"))
    stage.pace.update(progress(300.0, 600, 600, "responses"))
    stage.pace.update(progress(310.0, 1, 6, "systems scored"))
    stage.pace.update(progress(320.0, 2, 6, "systems scored"))
    assert stage.status().startswith("2/6 systems scored · 40s left")
    stage.pace.update(progress(330.0, 1, 9, "systems scored"))  # the next pass, in the same unit
    stage.pace.update(progress(335.0, 2, 9, "systems scored"))
    assert stage.status().startswith("2/9 systems scored · 35s left")


def test_a_stage_shows_the_step_it_is_at() -> None:
    stage = RunningStage(started=0.0)
    stage.pace.update(progress(0.0, 0, 4, "parts", step="loading torch and transformers"))
    assert stage.status() == "0/4 parts · loading torch and transformers"


def test_parts_that_are_not_alike_give_no_estimate() -> None:
    stage = RunningStage(started=0.0, phase="")
    stage.pace.update(progress(0.0, 0, 4, "parts"))
    stage.pace.update(progress(1.0, 1, 4, "parts", step="fetching tiny"))
    assert stage.report(70.0) == "1/4 parts · fetching tiny · silent for 1m 09s"


def test_large_rates_have_all_their_digits() -> None:
    stage = RunningStage(started=0.0)
    stage.pace.update(progress(0.0, 0, 10_000_000, "rows"))
    stage.pace.update(progress(10.0, 7_430_000, 10_000_000, "rows"))
    assert "743,000 rows/s" in stage.status()


def test_phase_is_named_until_there_is_progress() -> None:
    console_listener, out = listener()
    console_listener.stage_started(NODE, Path(), resumed=False)
    console_listener.running["one"] = RunningStage(started=0.0, reported=0.0)
    console_listener.stage_event(NODE, {"event": "phase", "text": "starting the engine"})
    console_listener.report_running(70.0)
    console_listener.stage_event(NODE, progress(71.0, 1, 12, "updates"))
    console_listener.stage_event(NODE, {"event": "phase", "text": "learning 2/4"})
    console_listener.report_running(130.0)
    console_listener.stage_event(NODE, progress(135.0, 2, 12, "updates"))
    console_listener.report_running(190.0)
    assert out.getvalue().splitlines()[1:] == [
        "▸ one  running for 1m 10s: starting the engine",
        "▸ one  1/12 updates · learning 2/4",
        "▸ one  2/12 updates · 10m 40s left · 0.938 updates/min",
    ]


def test_first_progress_line_appears_after_ten_seconds() -> None:
    console_listener, out = listener()
    console_listener.stage_started(NODE, Path(), resumed=False)
    console_listener.running["one"] = RunningStage(started=0.0, reported=0.0)
    console_listener.stage_event(NODE, progress(1.0, 0, 40, "steps"))
    console_listener.stage_event(NODE, progress(9.0, 4, 40, "steps"))
    console_listener.report_running(9.0)
    assert out.getvalue().splitlines() == ["▸ one  starts"]
    console_listener.report_running(10.0)
    console_listener.report_running(69.0)
    assert out.getvalue().splitlines()[1:] == ["▸ one  4/40 steps · 1m 12s left · 30 steps/min"]


def test_a_log_gets_a_line_a_minute_about_a_running_stage() -> None:
    console_listener, out = listener()
    console_listener.stage_started(NODE, Path(), resumed=False)
    console_listener.running["one"] = RunningStage(started=0.0, reported=0.0, pause=60.0)
    console_listener.report_running(59.0)
    console_listener.report_running(60.0)
    console_listener.stage_event(NODE, progress(65.0, 0, 40, "responses"))
    console_listener.stage_event(NODE, progress(115.0, 20, 40, "responses"))
    console_listener.report_running(119.0)
    console_listener.report_running(120.0)
    console_listener.report_running(180.0)
    console_listener.stage_done(NODE, artifact("evaluate", {}))
    console_listener.report_running(1000.0)
    lines = out.getvalue().splitlines()
    assert lines[:3] == [
        "▸ one  starts",
        "▸ one  running for 1m 00s: importing",
        "▸ one  20/40 responses · 50s left · 24 responses/min",
    ]
    assert lines[3] == lines[2] + " · silent for 1m 05s"
    assert len(lines) == 5


def test_the_line_a_minute_needs_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that says nothing at all is reported by the listener's own thread."""
    monkeypatch.setattr("align.runner.listener.FIRST_REPORT", 0.0)
    console_listener, out = listener()
    with console_listener:
        console_listener.stage_started(NODE, Path(), resumed=True)
        deadline = time.monotonic() + 10
        while ": importing" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert out.getvalue().startswith("▸ one  resumes\n▸ one  running for ")


def test_a_stage_back_in_the_queue_is_not_reported_as_running() -> None:
    console_listener, out = listener()
    console_listener.stage_started(NODE, Path(), resumed=False)
    console_listener.stage_queued(NODE, "job 7 waits")
    console_listener.report_running(time.time() + 3600)
    assert out.getvalue().splitlines() == ["▸ one  starts", "… one  job 7 waits"]


def test_time_of_earlier_attempts_is_named() -> None:
    console_listener, out = listener()
    finished = artifact("evaluate", {})
    finished.record["attempts"] = [40.0, 20.0, 15.0]
    console_listener.stage_done(NODE, finished)
    assert "1m 15s" in out.getvalue() and "(1m 00s of the time in 2 earlier attempts)" in out.getvalue()
    finished.record["attempts"] = [75.0]
    console_listener.stage_done(NODE, finished)
    assert "attempt" not in out.getvalue().splitlines()[1]


def test_narrow_terminal_shows_time_and_breaks_no_word() -> None:
    out = io.StringIO()
    node: Any = SimpleNamespace(name="evaluate", stage=STAGES["evaluate"])
    console_listener = ConsoleListener([node], Console(file=out, force_terminal=True, width=80, highlight=False))
    console_listener.stage_started(node, Path(), resumed=False)
    console_listener.stage_event(node, progress(0.0, 0, 2700, "responses", tokens=0))
    console_listener.stage_event(node, progress(100.0, 1250, 2700, "responses", tokens=80_000, gold=0.5))
    with console_listener.console.capture() as capture:
        console_listener.console.print(console_listener.progress.get_renderable())
    (line,) = Text.from_ansi(capture.get()).plain.splitlines()
    assert "1250/2700 responses · 1m 56s left" in line and len(line) <= 80
    values = {f"policy-{number}": {"gold": 0.25} for number in range(6)}
    console_listener.stage_done(node, artifact("evaluate", {"reward_accuracy": 0.71, "values": values}))
    lines = Text.from_ansi(out.getvalue()).plain.splitlines()
    assert all(len(line) <= 80 for line in lines) and len(lines) > 1
    assert all(line.startswith(" " * 12) for line in lines[1:])
    assert all(f"policy-{number} 0.25" in "\n".join(lines) for number in range(6))


GIB = 2**30


def choices(unit: int) -> Estimate:
    small = Memory(weights=unit, gradients=0, optimizer=unit // 2, activations=unit // 1000)
    large = Memory(weights=2 * unit, gradients=0, optimizer=unit, activations=None)
    options = (Choice({"tuning": "lora r8", "critic": "head"}, small, False),
            Choice({"tuning": "full", "critic": "policy"}, large, True))  # fmt: skip
    return Estimate(1_234_567_890, options, ("One note.",))


def test_memory_table_marks_the_chosen_row() -> None:
    assert memory_lines("ppo", choices(GIB)) == [
        "ppo: memory of a process in GiB, counted for 1,234.6 million parameters",
        "     tuning   critic  policy  AdamW  in all  + per 1k tokens",
        "     lora r8  head      1.00   0.50    1.50             1.00",
        "  *  full     policy    2.00   1.00    3.00        not known",
        "  One note.",
    ]


def test_a_narrow_terminal_has_a_column_for_each_choice() -> None:
    lines = memory_lines("ppo", choices(GIB), width=50)
    assert lines[1:] == [
        f"{'*':>37}",
        "  tuning           lora r8       full",
        "  critic              head     policy",
        "  policy              1.00       2.00",
        "  AdamW               0.50       1.00",
        "  in all              1.50       3.00",
        "  + per 1k tokens     1.00  not known",
        "  One note.",
    ]


def test_a_model_of_a_few_megabytes_is_told_in_mib() -> None:
    lines = memory_lines("ppo", choices(2**20))
    assert "in MiB" in lines[0] and "1.50" in lines[2]


def test_memory_that_is_not_known_says_why_in_one_line() -> None:
    assert memory_lines("ppo", "no \x1b[2Jrule") == ["ppo: memory not known: no \\x1b[2Jrule."]
