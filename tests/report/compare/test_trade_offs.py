"""KLs that differ by two orders of magnitude between compared runs."""

from __future__ import annotations

from pathlib import Path

from align.report.compare.comparison import write_comparison
from align.report.compare.trade_offs import kl_gaps
from align.report.page.metric_series import Events
from align.store.artifacts import Artifact, Kind
from tests.support.report.example_sweep import make_sweep


def gaps(runs: dict[str, dict[str, list[float]]], keys: dict[str, str] | None = None) -> list[str]:
    """Return the gaps of runs, given as stage → KL by update."""
    artifacts = {
        run: {
            stage: Artifact(stage, Kind.POLICY, Path(), {"key": (keys or {}).get(run, f"{run} {stage}")})
            for stage in stages
        }
        for run, stages in runs.items()
    }
    events = {
        run: {
            stage: Events({"kl": (list(range(len(values))), values)} if values else {})
            for stage, values in stages.items()
        }
        for run, stages in runs.items()
    }
    return kl_gaps(artifacts, events)


def test_two_orders_of_magnitude_are_reported() -> None:
    (text,) = gaps({"slow": {"ppo": [0.0, 0.01, 0.02, 0.02]}, "fast": {"ppo": [0.0, 1.0, 3.0, 5.0]}})
    assert text.startswith(
        "slow: ppo has a KL of 0.020 nats a response, and fast: ppo has 4.00, 200.0 times as large. One policy has "
    )


def test_one_order_of_magnitude_is_not_reported() -> None:
    assert gaps({"slow": {"ppo": [0.0, 0.1, 0.2]}, "fast": {"ppo": [0.0, 1.0, 5.0]}}) == []


def test_negligible_kls_are_not_reported() -> None:
    assert gaps({"slow": {"ppo": [0.0, 1e-6]}, "fast": {"ppo": [0.0, 1e-3]}}) == []


def test_policy_that_never_moved_is_reported() -> None:
    (text,) = gaps({"none": {"ppo": [0.0, 0.0]}, "some": {"ppo": [0.0, 0.5]}})
    assert text.startswith("none: ppo has a KL of 0.000 nats a response, and some: ppo has 0.500. One policy")


def test_single_update_is_not_compared() -> None:
    assert gaps({"one": {"ppo": [0.0]}, "many": {"ppo": [0.0, 5.0]}}) == []


def test_stages_of_other_names_are_compared_by_the_last() -> None:
    (text,) = gaps({"a": {"sft": [], "ppo": [0.01, 0.02]}, "b": {"warm": [0.0, 9.0], "grpo": [0.0, 5.0]}})
    assert text.startswith("a: ppo has") and "b: grpo has" in text


def test_rounds_of_loops_are_compared_by_name() -> None:
    rounds = {"ppo-1": [0.0, 0.02], "ppo-2": [0.0, 4.0]}
    assert gaps({"a": rounds, "b": rounds}) == []


def test_shared_stage_has_no_gap() -> None:
    assert gaps({"a": {"ppo": [0.0, 0.01]}, "b": {"ppo": [0.0, 5.0]}}, {"a": "same", "b": "same"}) == []


def test_page_and_warnings_name_the_gap(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"slow": (0.5, 0.03), "fast": (0.6, 9.0)})
    warnings: list[str] = []
    page = write_comparison(runs, tmp_path / "page" / "compare.html", warn=warnings.append)
    (warning,) = warnings
    assert "slow: ppo has a KL of 0.021" in warning and "300.0 times as large" in warning
    assert f"⚠ {warning}" in page.read_text(encoding="utf-8")
    # Without an evaluation the page has the warning as well.
    for artifacts in runs.values():
        del artifacts["evaluate"]
    text = write_comparison(runs, tmp_path / "bare" / "compare.html").read_text(encoding="utf-8")
    assert f"⚠ {warning}" in text
