"""Replays: a stage that learns from stored rollouts ends with the weights of the run that sampled them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from align.config.stages.policy_gradient import PpoConfig
from align.errors import UserError
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.stages import rl
from align.store.artifacts import Artifact, Kind
from align.store.rollouts import ROLLOUTS, open_rollouts
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.rl.stages import KINDS, make_stage
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.kills import Kill, assert_same, run, run_killed

REPLAYS: dict[str, dict[str, Any]] = {
    # The critic, the KL controller and the running scale of the scores have a state.
    "ppo": {"num_mini_batches": 2},
    # Groups without variance are replaced by further rounds of sampling.
    "grpo": {
        "score": "tests.support.stages.vowels:has_vowel",
        "score_validation": {"rows": 0},
        "temperature": 0.5,
    },
    "rloo": {},
    "online_dpo": {},
    "rejection": {},
}


def run_live(kind: str, root: Path, model: Path, **fields: Any) -> tuple[StageContext, dict[str, Any]]:
    context = make_stage(kind, root, model, **fields)
    return context, STAGES[kind].runner()(context)


def run_replay(kind: str, root: Path, model: Path, folder: Path, **fields: Any) -> tuple[StageContext, dict[str, Any]]:
    return run_live(kind, root, model, replay={"folder": str(folder)}, **fields)


def weights(context: StageContext) -> dict[str, Any]:
    return load_file(context.output / "model" / "model.safetensors")


def assert_same_weights(first: StageContext, second: StageContext) -> None:
    expected, actual = weights(first), weights(second)
    assert expected.keys() == actual.keys()
    assert all((expected[name] == actual[name]).all() for name in expected)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a stage fail that opens an engine, a player or a scorer."""

    def forbid() -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise AssertionError("a replay opened an engine, a player or a scorer")

        for name in ("open_engine", "open_player", "open_parts"):
            monkeypatch.setattr(rl, name, fail)

    return forbid


@pytest.mark.parametrize("kind", KINDS)
def test_replay_ends_with_the_weights_of_the_live_run(
    kind: str, tiny_model: Path, tmp_path: Path, no_engine: Any
) -> None:
    fields = {"updates": 3, "save_updates": 3, **REPLAYS[kind]}
    live, metrics = run_live(kind, tmp_path / "live", tiny_model, **fields)
    rows = open_rollouts(live.output / ROLLOUTS).to_table(columns=["round", "learned"])
    if kind == "grpo":
        assert set(rows["round"].to_pylist()) > {0}, "the test needs an update that samples more"
    if kind == "rejection":
        assert set(rows["learned"].to_pylist()) == {True, False}
    no_engine()
    replayed, replayed_metrics = run_replay(kind, tmp_path / "replayed", tiny_model, live.output / ROLLOUTS, **fields)
    assert_same_weights(live, replayed)
    assert replayed_metrics["engine"] == "replay"
    for name in ("episodes", "tokens", "score_last", "kl_last", "kl_coef_last", "entropy_last", "length_last"):
        assert replayed_metrics[name] == metrics[name], name
    # The replay stores the same rollouts, which can be replayed again.
    tables = [open_rollouts(context.output / ROLLOUTS).to_table() for context in (live, replayed)]
    assert tables[1].equals(tables[0])


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_killed_replay_ends_with_equal_weights(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    fields = {"updates": 4, **REPLAYS[kind]}
    live, _ = run_live(kind, tmp_path / "live", tiny_model, **fields)
    folder = {"replay": {"folder": str(live.output / ROLLOUTS)}}
    whole = make_stage(kind, tmp_path / "whole", tiny_model, **fields, **folder)
    killed = make_stage(kind, tmp_path / "killed", tiny_model, **fields, **folder)
    # The stage dies before any checkpoint, within the first one, after it, and with half of the model written.
    steps = 2 * 2 * fields.get("num_mini_batches", 1)  # of two updates with two epochs each
    with pytest.raises(Killed):
        run(dying(killed, 1, "updates"))
    expected = run(whole)
    metrics = run_killed(killed, [Kill("during", steps), Kill("after", steps), Kill("saved")])
    assert_same(whole, killed, expected, metrics)
    assert_same_weights(live, killed)
    tables = [open_rollouts(context.output / ROLLOUTS).to_table() for context in (live, killed)]
    assert tables[1].equals(tables[0])


def test_replay_with_another_rate_learns_otherwise(tiny_model: Path, tmp_path: Path) -> None:
    fields = {"updates": 2, "save_updates": 2}
    live, _ = run_live("ppo", tmp_path / "live", tiny_model, **fields)
    changed, _ = run_replay("ppo", tmp_path / "r", tiny_model, live.output / ROLLOUTS, **fields, learning_rate=2e-3)
    expected, actual = weights(live), weights(changed)
    assert any((expected[name] != actual[name]).any() for name in expected)


def test_episodes_are_replayed_from_the_folder_of_a_stage(tiny_model: Path, tmp_path: Path, no_engine: Any) -> None:
    presser = make_presser(tiny_model, tmp_path / "presser")
    environment = {"class": "tests.support.environments.buttons:Buttons", "tool_format": FORMAT, "max_turns": 3,
                   "max_tokens": 60, "turn_max_tokens": 8}  # fmt: skip
    fields = {"environment": environment, "score": None, "max_tokens": 60, "updates": 2, "save_updates": 2}
    live, metrics = run_live("ppo", tmp_path / "live", presser, **fields)
    no_engine()
    replay = make_stage("ppo", tmp_path / "replayed", presser, **fields, replay="live")
    replay.inputs["replay"] = Artifact("live", Kind.POLICY, live.output, {})
    replayed_metrics = STAGES["ppo"].runner()(replay)
    assert_same_weights(live, replay)
    for name in ("turns_last", "calls_last", "tool_errors_last", "failure_rate_last"):
        assert replayed_metrics[name] == metrics[name], name


def test_rollouts_that_do_not_fit_are_refused_before_models_load(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"updates": 2, "save_updates": 2}
    live, _ = run_live("grpo", tmp_path / "live", tiny_model, **fields)
    half, _ = run_live("grpo", tmp_path / "half", tiny_model, **fields, rollouts={"keep": 0.6})
    monkeypatch.setattr(rl, "load_for_tuning", lambda *args: pytest.fail("a model was loaded"))
    stored = live.output / ROLLOUTS
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "none", {}, r"stages\.grpo\.replay: .*none has no rollouts"),
        (half.output / ROLLOUTS, {}, r"a share of 0\.6 of the prompts.*keep: 1\.0"),
        (stored, {"rollout_batch": 16}, r"sampled with rollout_batch 8, and this stage has 16\. Set rollout_batch: 8"),
        (stored, {"temperature": 0.5}, "sampled with temperature 1.0, and this stage has 0.5"),
        (stored, {"updates": 3}, r"of 8 responses in update 3, .* has 0, and this stage makes 3 updates"),
    ]
    for number, (folder, changes, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            run_replay("grpo", tmp_path / str(number), tiny_model, folder, **{**fields, **changes})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eval_updates", 1, "replay learns without an engine, and eval_updates needs one; remove eval_updates"),
        ("continue_from", "other", "replay begins with the first update"),
    ],
)
def test_replay_refuses_what_needs_an_engine(field: str, value: Any, message: str) -> None:
    base: dict[str, Any] = {"policy": "p", "prompts": "q", "score": "gold", "learning_rate": 1e-3, "replay": "live"}
    with pytest.raises(ValidationError, match=message):
        PpoConfig(**base, **{field: value})


def test_folder_of_a_replay_counts_by_its_files(tiny_model: Path, tmp_path: Path) -> None:
    live, _ = run_live("grpo", tmp_path / "live", tiny_model, updates=1, save_updates=1)
    shutil.copytree(live.output / ROLLOUTS, tmp_path / "copy")
    fields: dict[str, Any] = {"policy": "p", "prompts": "q", "score": "gold", "learning_rate": 1e-3}

    def identity(folder: str) -> str:
        return PpoConfig(**fields, replay={"folder": folder}).identities(tmp_path)["replay"]

    assert identity("copy") == identity(str(live.output / ROLLOUTS))
    (tmp_path / "copy" / "000009.parquet").write_bytes(b"more")
    assert identity("copy") != identity(str(live.output / ROLLOUTS))
    assert "replay" not in PpoConfig(**fields).identities(tmp_path)
    with pytest.raises(UserError, match=r"replay\.folder: elsewhere has no Parquet files"):
        identity("elsewhere")
