"""Stage merge: what comes out, what is refused, and that the result is an ordinary checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align import Pipeline
from align.config.stages.merge import MergeConfig
from align.config.tuning import AdaptersTuning
from align.models import merging as methods
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.models.tuning.stored import apply, write_adapter
from align.pipeline.context import StageContext
from align.stages.merge import merge_tensor, run
from align.store.artifacts import Kind
from tests.support.refusals import Refused
from tests.support.stages.stage_contexts import merge_stage, perturbed_copy


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
    folders = {"base": tmp_path / "base" / "model"}
    shutil.copytree(tiny_model, folders["base"])
    return folders | {
        name: perturbed_copy(tiny_model, tmp_path / name / "model", seed) for seed, name in enumerate("abc")
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != "lm_head.weight"
    }


def test_a_config_reads_back_as_it_was_resolved() -> None:
    """A stage's process gets every field, defaults too."""
    config = MergeConfig(policies=["a", "b"])
    assert MergeConfig(**config.model_dump()) == config


def test_a_soup_is_the_average_and_answers_like_a_model(trained: dict[str, Path], tmp_path: Path) -> None:
    stage = merge_stage(tmp_path / "run", trained, policies=["a", "b", "c"], weights=[2, 1, 1])
    metrics = run(stage)
    result = stage.output / "model"
    merged, weights = weights_of(result), [weights_of(trained[name]) for name in "abc"]
    assert merged.keys() == weights[0].keys()
    for name, tensor in merged.items():
        assert torch.allclose(
            tensor, 0.5 * weights[0][name] + 0.25 * weights[1][name] + 0.25 * weights[2][name], atol=1e-6
        )
    assert metrics["models"] == 3
    assert all(cosine > 0.9 for cosine in metrics["cosine_to_start"])
    model, ids = load_policy(result), torch.tensor([[40, 50, 60]])
    assert load_tokenizer(result).chat_template == load_tokenizer(trained["a"]).chat_template
    reference = load_policy(trained["a"])
    reference.load_state_dict(merged | {"lm_head.weight": merged["model.embed_tokens.weight"]})
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "warp"])
def test_every_method_goes_from_the_base_by_its_scale(method: str, trained: dict[str, Path], tmp_path: Path) -> None:
    full = merge_stage(tmp_path / "full", trained, policies=["a", "b"], base="base", method=method)
    half = merge_stage(tmp_path / "half", trained, policies=["a", "b"], base="base", method=method, scale=0.5)
    full_metrics, half_metrics = run(full), run(half)
    base, full_weights, half_weights = (
        weights_of(folder) for folder in (trained["base"], full.output / "model", half.output / "model")
    )
    for name in base:
        assert torch.allclose(half_weights[name] - base[name], 0.5 * (full_weights[name] - base[name]), atol=1e-6)
    assert half_metrics["merged_moved"] == pytest.approx(full_metrics["merged_moved"] / 2, rel=1e-4)
    assert full_metrics["task_cosines"] == [pytest.approx(0, abs=0.05)]
    # Two ways at right angles: an average is as long as one of them over sqrt 2, WARP's merge as long as one of them.
    if method == "warp":
        assert full_metrics["merged_moved"] == pytest.approx(full_metrics["moved"][0], rel=0.02)
    if method in ("linear", "task_arithmetic"):
        way = sum(float((weights_of(trained["a"])[name] - base[name]).double().square().sum()) for name in base)
        length = sum(float(base[name].double().square().sum()) for name in base)
        assert full_metrics["moved"][0] == pytest.approx(math.sqrt(way / length), rel=1e-5)
        assert full_metrics["merged_moved"] == pytest.approx(full_metrics["moved"][0] / 2**0.5, rel=0.02)


@pytest.mark.parametrize("base", [None, "base"])
def test_slerp_stays_nearer_to_the_one_with_the_larger_share(
    base: str | None, trained: dict[str, Path], tmp_path: Path
) -> None:
    stage = merge_stage(tmp_path / "run", trained, policies=["a", "b"], base=base, method="slerp", weights=[3, 1])
    run(stage)
    merged, first, second = (weights_of(f) for f in (stage.output / "model", trained["a"], trained["b"]))
    for name in merged:
        assert torch.allclose(merged[name], methods.slerp(first[name], second[name], 0.25), atol=1e-6), name


def test_what_dare_drops_differs_from_tensor_to_tensor() -> None:
    config = MergeConfig(policies=["a", "b"], base="base", method="dare_linear", density=0.5)
    tensors, origin = [torch.ones(64), torch.ones(64)], torch.zeros(64)
    first, second = (merge_tensor(config, name, tensors, origin, seed=5) for name in ("q_proj", "k_proj"))
    assert not first.equal(second)


class Stopped(BaseException):
    pass


class Stopping(StageContext):
    """A context in which the merge ends after its fifth tensor."""

    def progress(self, done: float, total: float, unit: str = "steps", **shown: Any) -> None:
        if done == 5:
            raise Stopped


def test_a_killed_merge_makes_the_same_when_it_is_run_again(trained: dict[str, Path], tmp_path: Path) -> None:
    """There is nothing to go on from: what a method draws at random follows from the seed and the tensor's name."""
    fields: dict[str, Any] = {"policies": ["a", "b"], "base": "base", "method": "dare_ties"}
    uninterrupted, killed = (merge_stage(tmp_path / name, trained, **fields) for name in ("whole", "killed"))
    expected = run(uninterrupted)
    with pytest.raises(Stopped):
        run(Stopping(**{field.name: getattr(killed, field.name) for field in dataclasses.fields(killed)}))
    assert not (killed.output / "model").exists()
    torch.manual_seed(999)  # a fresh process has another random state
    assert run(killed) == expected
    expected_bytes, resumed_bytes = (
        (stage.output / "model" / "model.safetensors").read_bytes() for stage in (uninterrupted, killed)
    )
    assert expected_bytes == resumed_bytes
    weights = weights_of(uninterrupted.output / "model")
    assert any(not weights[name].equal(tensor) for name, tensor in weights_of(trained["base"]).items())


def test_a_single_policy_may_go_part_of_its_way(trained: dict[str, Path], tmp_path: Path) -> None:
    stage = merge_stage(tmp_path / "run", trained, policies=["a"], base="base", scale=0.3)
    run(stage)
    merged, base, policy = (weights_of(f) for f in (stage.output / "model", trained["base"], trained["a"]))
    assert all(torch.allclose(merged[n], 0.7 * base[n] + 0.3 * policy[n], atol=1e-6) for n in merged)


def test_reward_models_merge_with_their_heads(tiny_reward: Path, tiny_model: Path, tmp_path: Path) -> None:
    folders = {name: perturbed_copy(tiny_reward, tmp_path / name / "model", seed) for seed, name in enumerate("ab")}
    stage = merge_stage(tmp_path / "run", folders, Kind.REWARD, rewards=["a", "b"])
    assert stage.config.makes() == Kind.REWARD
    run(stage)
    heads = [load_reward(folder).score.weight for folder in (*folders.values(), stage.output / "model")]
    assert torch.allclose(heads[2], (heads[0] + heads[1]) / 2, atol=1e-6)


def rewards_and_base(reward: Path, policy: Path, folder: Path) -> dict[str, Path]:
    """Return two reward models, ``a`` and ``b``, and a policy as their ``base``."""
    folders = {name: perturbed_copy(reward, folder / name / "model", seed) for seed, name in enumerate("ab")}
    folders["base"] = folder / "base" / "model"
    shutil.copytree(policy, folders["base"])
    return folders


def test_reward_models_merge_from_a_policy_which_has_no_head(
    tiny_reward: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folders = rewards_and_base(tiny_reward, tiny_model, tmp_path)
    stage = merge_stage(tmp_path / "run", folders, Kind.REWARD, rewards=["a", "b"], base="base", scale=0.5)
    run(stage)
    heads = [load_reward(folders[name]).score.weight for name in "ab"]
    # a head starts at zero, so half the way to the average is a quarter of the sum
    head = load_reward(stage.output / "model").score.weight
    assert torch.allclose(head, (heads[0] + heads[1]) / 4, atol=1e-6)


def untie(folder: Path) -> None:
    """Give a checkpoint a head of its own, as a merged adapter on the head or the embeddings does."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = -weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


@pytest.mark.parametrize("policies", [["a", "b"], ["b", "a"]])
def test_a_head_that_only_one_checkpoint_has_is_refused(
    refused: Refused, policies: list[str], trained: dict[str, Path], tmp_path: Path
) -> None:
    untie(trained["b"])
    refused(lambda: run(merge_stage(tmp_path / "run", trained, policies=policies)))


def test_reward_models_merge_from_a_policy_with_own_head(tiny_reward: Path, tiny_model: Path, tmp_path: Path) -> None:
    folders = rewards_and_base(tiny_reward, tiny_model, tmp_path)
    untie(folders["base"])
    stage = merge_stage(tmp_path / "run", folders, Kind.REWARD, rewards=["a", "b"], base="base")
    run(stage)
    heads = [load_reward(folder).score.weight for folder in (folders["a"], folders["b"], stage.output / "model")]
    assert torch.allclose(heads[2], (heads[0] + heads[1]) / 2, atol=1e-6)


def test_an_adapter_beside_the_weights_is_named_by_its_method(
    refused: Refused, trained: dict[str, Path], tmp_path: Path
) -> None:
    tuned = apply(load_policy(trained["b"]), AdaptersTuning(kind="llama_adapter", layers=1), 0, None)
    write_adapter(tuned, trained["b"] / "adapter")
    refused(lambda: run(merge_stage(tmp_path / "run", trained, policies=["a", "b"])))


@pytest.mark.parametrize(
    "fault",
    [
        "architecture",
        "template",
        "vocabulary",
        "origin",
        "adapter",
        "shape",
    ],
)
def test_what_does_not_fit_together_is_refused(
    refused: Refused, fault: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    folder = trained["b"]
    if fault == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif fault == "template":
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template += " "
        tokenizer.save_pretrained(folder)
    elif fault == "vocabulary":
        content = json.loads((folder / "tokenizer.json").read_text())
        ids = content["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    elif fault == "adapter":
        (folder / "adapter").mkdir()
    else:
        weights = load_file(folder / "model.safetensors")
        if fault == "shape":
            weights["model.norm.weight"] = weights["model.norm.weight"][:32].clone()
        else:
            torch.manual_seed(0)
            # norms are near 1 in every model: matrices alone tell where it started
            weights = {n: torch.randn_like(t) * t.std() if t.dim() > 1 else t for n, t in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: run(merge_stage(tmp_path / "run", trained, policies=["a", "b"])))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"policies": ["sft"]},
        {"policies": ["sft", "sft"]},
        {"policies": ["sft", "dpo"], "method": "ties"},
        {"policies": ["sft", "dpo"], "scale": 0.5},
        {"policies": ["sft", "dpo"], "density": 0.3},
        {"policies": ["sft", "dpo"], "weights": [1]},
        {"policies": ["sft", "dpo"], "weights": [1, -1]},
        {"policies": ["sft", "dpo"], "base": "sft", "method": "warp"},
        {"policies": ["sft", "dpo", "model"], "method": "slerp"},
        {"policies": ["sft", "dpo"], "metod": "ties"},
        {"policy": ["sft", "dpo"]},
        {"policies": ["sft", "dpo"], "method": "tie"},
        {"rewards": ["sft", "dpo"]},
    ],
)
def test_unfit_settings_are_refused_when_the_file_is_read(refused: Refused, fields: dict[str, Any]) -> None:
    stages = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/quickstart.yaml"},
        "sft": {"model": "model", "data": "data", "learning_rate": 1e-3},
        "dpo": {"stage": "sft", "model": "model", "data": "data", "learning_rate": 2e-3},
        "merge": fields,
    }
    refused(lambda: Pipeline({"name": "p", "stages": stages}, "p.yaml", Path(__file__).parents[2]))
