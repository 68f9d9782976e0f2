"""Soft prompts, prefix and adapters in the stages that train: they learn, resume, and refuse misspelled keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.validation import validate
from align.errors import UserError
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Kind
from tests.support.models.tuning.confident_model import confident_copy
from tests.support.training.harness import context, data_artifact, events, losses
from tests.support.training.killed_stage import Killed, dying

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt", "tokens": 8},
    "p_tuning": {"method": "p_tuning", "tokens": 8, "hidden_size": 32},
    "prefix": {"method": "prefix", "tokens": 8},
    "parallel": {"method": "adapters", "size": 32},
    "sequential": {"method": "adapters", "size": 32, "position": "sequential"},
    "llama_adapter": {"method": "adapters", "kind": "llama_adapter", "tokens": 8, "layers": 2},
}
BELOW = {"prompt": 0.6, "p_tuning": 0.6, "prefix": 0.5, "parallel": 0.2, "sequential": 0.2, "llama_adapter": 0.5}
"""Share of the held-out loss before that is left after six epochs; the whole model stays frozen."""


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return confident_copy(tiny_model, tmp_path_factory.mktemp("confident") / "base")


def made(kind: str, root: Path, model: Path, method: str, **fields: Any) -> StageContext:
    source = "policy" if kind == "dpo" else "model"
    options = {"learning_rate": 3e-2, "epochs": 3, "batch_size": 8, "max_length": 128} | fields
    config = STAGES[kind].config_class()(
        **{source: "model"}, data="data", tuning=METHODS.get(method, {"method": method}), **options
    )
    return context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES, train=fields.pop("rows", 40)),
                   source)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_sft_learns_and_what_it_saves_says_the_same(method: str, base: Path, tmp_path: Path) -> None:
    stage = made("sft", tmp_path, base, method, epochs=10, precision="float32")
    metrics = STAGES["sft"].runner()(stage)
    assert metrics["test_loss_after"] < BELOW[method] * metrics["test_loss_before"]
    assert not events(stage, "warning")
    folder = stage.output / "model"
    frozen, remaining = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    same = [torch.equal(remaining[n][tuple(slice(size) for size in t.shape)], t) for n, t in frozen.items()]
    assert all(same)  # nothing but the adapter was trained: what it was folded into begins with what was there
    # the saved checkpoint begins a further training where this one ended
    again = made("sft", tmp_path / "again", folder, "full", max_steps=1, learning_rate=1e-6, precision="float32")
    actual = STAGES["sft"].runner()(again)["test_loss_before"]
    assert actual == pytest.approx(metrics["test_loss_after"], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=[] if method in quick else [pytest.mark.slow])
        for kind, quick in (("dpo", ("prompt",)), ("reward", ("sequential",)))
        for method in METHODS
    ],
)
def test_pairs_are_learned(kind: str, method: str, base: Path, tmp_path: Path) -> None:
    metrics = STAGES[kind].runner()(made(kind, tmp_path, base, method, epochs=6))
    assert metrics["test_accuracy_after"] >= 0.9
    assert metrics["test_loss_after"] < 0.35


def resumes(kind: str, method: str, base: Path, tmp_path: Path) -> None:
    run = STAGES[kind].runner()
    fields = {"save_steps": 4, "micro_batch_size": 4}
    uninterrupted = made(kind, tmp_path / "whole", base, method, **fields)
    run(uninterrupted)
    parts = made(kind, tmp_path / "parts", base, method, **fields)
    with pytest.raises(Killed):
        run(dying(parts, 10))
    saved = load_file(parts.checkpoints / "checkpoint-8" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) < 15000  # the frozen model has 100,000
    metrics = run(parts)
    assert metrics["resumed_from_step"] == 8
    assert losses(parts) == losses(uninterrupted)
    names = [file.relative_to(uninterrupted.output) for file in sorted(uninterrupted.output.rglob("*.safetensors"))]
    assert len([name for name in names if name.parts[0] != "state"]) == 2  # the model and the adapter
    assert any(name.parts[0] == "state" for name in names)
    for name in names:
        expected, actual = load_file(uninterrupted.output / name), load_file(parts.output / name)
        assert expected.keys() == actual.keys()
        assert all(expected[key].equal(actual[key]) for key in expected), name


QUICK = ("prompt", "prefix", "parallel")
"""Of each way a module is inserted one; the others are slow tests."""


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in METHODS])
def test_a_resumed_run_equals_the_uninterrupted_one(method: str, base: Path, tmp_path: Path) -> None:
    resumes("sft", method, base, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_resumed_run_on_pairs_equals_the_uninterrupted_one(
    kind: str, method: str, base: Path, tmp_path: Path
) -> None:
    resumes(kind, method, base, tmp_path)


def test_dpo_refers_to_the_model_without_the_tokens(base: Path, tmp_path: Path) -> None:
    """A prompt that starts at random tokens changes what is said; the reference is the policy before it had one."""
    stage = made("dpo", tmp_path, base, "prompt", max_steps=1, precision="float32")
    STAGES["dpo"].runner()(stage)
    plain = made("dpo", tmp_path / "plain", base, "parallel", max_steps=1, precision="float32")  # starts as nothing
    STAGES["dpo"].runner()(plain)
    first, second = (next(e for e in events(entry, "metrics") if "rewards/margins" in e) for entry in (stage, plain))
    assert second["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(first["rewards/margins"]) > 1e-3


def test_prefix_goes_on_through_sft_and_dpo(base: Path, tmp_path: Path) -> None:
    sft = made("sft", tmp_path / "sft", base, "prefix")
    STAGES["sft"].runner()(sft)
    dpo = made("dpo", tmp_path / "dpo", sft.output / "model", "prefix", epochs=1, precision="float32")
    metrics = STAGES["dpo"].runner()(dpo)
    first = next(e for e in events(dpo, "metrics") if "rewards/margins" in e)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the reference is the policy with its prefix
    assert metrics["trainable_parameters"] == 2 * 2 * 8 * 64
    tokens = load_tokenizer(dpo.output / "model").get_vocab()
    assert tokens == load_tokenizer(sft.output / "model").get_vocab()
    described = json.loads((dpo.output / "model" / "adapter" / "adapter.json").read_text(encoding="utf-8"))
    assert described == {"format": 1, "tuning": {"method": "prefix", "tokens": 8}, "first_token": 260}
    load_policy(dpo.output / "model")


WRONG = [
    ({"method": "prompt", "tokns": 4}, "tokens"),
    ({"method": "prompt", "txt": "x"}, "text"),
    ({"method": "p_tuning", "encodr": "mlp"}, "encoder"),
    ({"method": "p_tuning", "hiden_size": 4}, "hidden_size"),
    ({"method": "prefix", "token": 4}, "tokens"),
    ({"method": "adapters", "sise": 8}, "size"),
    ({"method": "adapters", "positon": "parallel"}, "position"),
    ({"method": "adapters", "kind": "llama_adapter", "layer": 2}, "layers"),
    ({"method": "adapters", "position": "sequential", "aftr": ["mlp"]}, "after"),
]


def checked(tuning: dict[str, Any]) -> None:
    fields = {"model": "model", "data": "data", "learning_rate": 1e-3, "tuning": tuning}
    validate(STAGES["sft"].config_class(), fields, "p.yaml: stages.sft")


@pytest.mark.parametrize(("tuning", "meant"), WRONG, ids=lambda case: str(case))
def test_a_misspelled_key_is_refused_with_the_right_name(tuning: dict[str, Any], meant: str) -> None:
    with pytest.raises(UserError, match=f"stages.sft.tuning: unknown key .* Did you mean '{meant}'"):
        checked(tuning)


REFUSED = [
    (
        {"method": "adapters", "tokens": 4},
        "'tokens' has no effect with kind bottleneck, which has after, position, size",
    ),
    ({"method": "adapters", "kind": "llama_adapter", "size": 8}, "'size' has no effect with kind llama_adapter"),
    ({"method": "adapters", "after": ["attention"]}, "'after' is for a sequential bottleneck"),
    ({"method": "adapters", "position": "sequential", "after": ["mlp", "mlp"]}, "names a part twice"),
    ({"method": "adapters", "size": 12}, "multiple of 8"),
    ({"method": "prompt", "tokens": 0}, "greater than or equal to 1"),
    ({"method": "prefx"}, "prefix"),
]


@pytest.mark.parametrize(("tuning", "message"), REFUSED, ids=lambda case: str(case)[:60])
def test_what_makes_no_sense_is_refused(tuning: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(tuning)
