"""Every fault of a hand-over, injected into checkpoints that are sound without it, is refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.checks.facts import read_facts
from align.checks.stage import check_inputs, check_output
from align.config.runtime import FAULT_REMEDIES, Runtime
from align.errors import UserError
from align.store.artifacts import Artifact, Kind
from tests.support.checks.contexts import WEIGHTS, Learner, context, edit_weights
from tests.support.refusals import Refused


def finished(folder: Path, source: Path, kind: Kind, **metrics: Any) -> Artifact:
    """A checkpoint as its stage leaves it: looked at, with its facts."""
    shutil.copytree(source, folder / "model")
    check_output(context(folder, {}), "reward" if kind == Kind.REWARD else "sft", kind, metrics)
    return Artifact("reward" if kind == Kind.REWARD else "sft", kind, folder, {})


@pytest.fixture
def artifacts(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> dict[str, Artifact]:
    """A policy and a reward model that fit together; the reward model orders 140 of 200 held-out pairs."""
    return {
        "policy": finished(tmp_path / "sft", tiny_model, Kind.POLICY),
        "reward": finished(tmp_path / "reward", tiny_reward, Kind.REWARD, test_accuracy_after=0.7, test_pairs=200),
    }


def edit_json(path: Path, **fields: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | fields), encoding="utf-8")


def cut(models: dict[str, Path]) -> None:
    data = (models["policy"] / WEIGHTS).read_bytes()
    (models["policy"] / WEIGHTS).write_bytes(data[: len(data) // 2])


def lose_a_shard(models: dict[str, Path]) -> None:
    listed = {"weight_map": dict.fromkeys([*load_file(models["policy"] / WEIGHTS), "model.layers.9.up"], WEIGHTS)}
    (models["policy"] / f"{WEIGHTS}.index.json").write_text(json.dumps(listed), encoding="utf-8")


def poison(models: dict[str, Path]) -> None:
    (models["policy"] / "align.json").unlink()  # what came from elsewhere is read in full
    edit_weights(models["policy"], lambda w: w["model.norm.weight"].view(-1)[3:4].fill_(float("nan")))


def narrow(models: dict[str, Path]) -> None:
    edit_weights(models["policy"], lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.int8)}))


def fewer_rows(models: dict[str, Path]) -> None:
    name = "model.embed_tokens.weight"
    edit_weights(models["policy"], lambda w: w.update({name: w[name][:200].clone()}))
    edit_json(models["policy"] / "config.json", vocab_size=200)


def other_vocab_size(models: dict[str, Path]) -> None:
    edit_json(models["policy"] / "config.json", vocab_size=300)


def no_head(models: dict[str, Path]) -> None:
    edit_weights(models["reward"], lambda w: w.pop("score.weight"))


def new_head(models: dict[str, Path]) -> None:
    edit_weights(models["reward"], lambda w: w["score.weight"].normal_(generator=torch.Generator().manual_seed(3)))


def policy_as_reward(models: dict[str, Path]) -> None:
    shutil.rmtree(models["reward"])
    shutil.copytree(models["policy"], models["reward"])


def reward_as_policy(models: dict[str, Path]) -> None:
    shutil.rmtree(models["policy"])
    shutil.copytree(models["reward"], models["policy"])


def other_template(models: dict[str, Path]) -> None:
    file = models["policy"] / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("im_start", "turn"), encoding="utf-8")


def reward_of_another_template(models: dict[str, Path]) -> None:
    other_template({"policy": models["reward"]})
    (models["reward"] / "align.json").unlink()


def other_tokenizer(models: dict[str, Path]) -> None:
    document = json.loads((models["policy"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (models["policy"] / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")


def reward_of_another_tokenizer(models: dict[str, Path]) -> None:
    other_tokenizer({"policy": models["reward"]})
    (models["reward"] / "align.json").unlink()


def pad_with_eos(models: dict[str, Path]) -> None:
    edit_json(models["policy"] / "tokenizer_config.json", pad_token="<|im_end|>")


def pad_with_another(models: dict[str, Path]) -> None:
    edit_json(models["policy"] / "tokenizer_config.json", pad_token="<|endoftext|>")


def end_elsewhere(models: dict[str, Path]) -> None:
    (models["policy"] / "align.json").unlink()
    edit_json(models["policy"] / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit_json(models["policy"] / "generation_config.json", eos_token_id=0)


def never_stop(models: dict[str, Path]) -> None:
    edit_json(models["policy"] / "generation_config.json", eos_token_id=[0])


def a_coin(models: dict[str, Path]) -> None:
    document = json.loads((models["reward"] / "align.json").read_text(encoding="utf-8"))
    document["handover"] |= {"accuracy": 0.56, "pairs": 200}  # above a half, its interval is not: [0.49, 0.63]
    (models["reward"] / "align.json").write_text(json.dumps(document), encoding="utf-8")


FAULTS: list[tuple[str, Callable[[dict[str, Path]], None]]] = [
    ("weights-truncated", cut),
    ("weights-truncated", lose_a_shard),
    ("weights-not-finite", poison),
    ("weights-dtype", narrow),
    ("vocabulary-size", fewer_rows),
    ("vocabulary-size", other_vocab_size),
    ("score-head", no_head),
    ("score-head", new_head),
    ("wrong-kind", policy_as_reward),
    ("wrong-kind", reward_as_policy),
    ("template-changed", other_template),
    ("template-changed", reward_of_another_template),
    ("tokenizer-changed", other_tokenizer),
    ("tokenizer-changed", reward_of_another_tokenizer),
    ("tokenizer-changed", pad_with_another),
    ("pad-is-eos", pad_with_eos),
    ("eos-not-turn-end", end_elsewhere),
    ("eos-not-turn-end", never_stop),
    ("reward-floor", a_coin),
]


@pytest.mark.parametrize(("name", "inject"), FAULTS, ids=[inject.__name__ for _, inject in FAULTS])
def test_it_is_refused_by_name(
    name: str, inject: Callable[[dict[str, Path]], None], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    check_inputs(context(tmp_path / "ppo", artifacts), Kind.POLICY)  # without the fault nothing is found
    inject({field: artifact.model for field, artifact in artifacts.items()})
    with pytest.raises(UserError) as refused:
        check_inputs(context(tmp_path / "ppo", artifacts), Kind.POLICY)
    actual = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:-1]]
    assert name in actual
    assert FAULT_REMEDIES[name] in str(refused.value)
    check_inputs(context(tmp_path / "ppo", artifacts, waive=actual), Kind.POLICY)


@pytest.mark.parametrize("inject", [other_template, other_tokenizer])
def test_a_change_shows_in_a_checkpoint_that_stands_alone(
    refused: Refused, inject: Callable[[dict[str, Path]], None], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    inject({"policy": artifacts["policy"].model})
    refused(lambda: check_inputs(context(tmp_path / "sft", {"policy": artifacts["policy"]}), Kind.POLICY))


def test_every_fault_is_injected_somewhere() -> None:
    here = {name for name, _ in FAULTS} | {"adapter-base", "thinking-changed"}  # test_adapters.py, test_thinking.py
    assert here == set(FAULT_REMEDIES)


def test_a_waiver_of_a_name_that_is_none_is_refused(refused: Refused) -> None:
    refused(Runtime.model_validate, {"handover": {"waive": ["score-haed"]}})


def test_a_stage_does_not_publish_what_would_be_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "sft" / "model")
    edit_weights(tmp_path / "sft" / "model", lambda w: w["model.norm.weight"].view(-1)[0:1].fill_(float("inf")))
    refused(lambda: check_output(context(tmp_path / "sft", {}), "sft", Kind.POLICY, {}))
    assert read_facts(tmp_path / "sft" / "model") is None


def test_a_head_that_learned_nothing_is_not_published(refused: Refused, tiny_reward: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_reward, tmp_path / "rm" / "model")
    edit_weights(tmp_path / "rm" / "model", lambda w: w["score.weight"].zero_())
    refused(lambda: check_output(context(tmp_path / "rm", {}), "reward", Kind.REWARD, {}))


def test_untrained_head_has_its_causes(refused: Refused, tiny_reward: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_reward, tmp_path / "rm" / "model")
    edit_weights(tmp_path / "rm" / "model", lambda w: w["score.weight"].zero_())
    skipped = "15 of 16 train rows skipped: longer than max_length"
    metrics = {"untrained": "the learning rate was 0 in its only step", "skipped_rows": [skipped]}
    refused(lambda: check_output(context(tmp_path / "rm", {}), "reward", Kind.REWARD, metrics))


def test_a_floor_needs_a_known_accuracy_and_says_so(
    artifacts: dict[str, Artifact], tiny_reward: Path, tmp_path: Path
) -> None:
    shutil.rmtree(artifacts["reward"].model)
    shutil.copytree(tiny_reward, artifacts["reward"].model)
    new_context = context(tmp_path / "ppo", artifacts)
    check_inputs(new_context, Kind.POLICY)
    assert "no accuracy of 'reward' on held-out pairs is recorded" in new_context.events.read_text(encoding="utf-8")


def test_what_is_only_compared_may_differ(refused: Refused, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    reward_of_another_template({field: artifact.model for field, artifact in artifacts.items()})
    a_coin_free = context(tmp_path / "evaluate", artifacts)
    check_inputs(a_coin_free, Kind.SCORECARD)
    refused(lambda: check_inputs(context(tmp_path / "ppo", artifacts), Kind.POLICY))
    # a reward model that only scores renders texts anew, with a template of its own
    check_inputs(context(tmp_path / "grpo", artifacts, config=Learner(critic_source="policy")), Kind.POLICY)


def test_a_floor_of_its_own_or_none(refused: Refused, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    # 140 of 200: the interval is [0.633, 0.759]
    check_inputs(context(tmp_path / "a", artifacts, config=Learner(reward_floor=0.63)), Kind.POLICY)
    refused(lambda: check_inputs(context(tmp_path / "b", artifacts, config=Learner(reward_floor=0.64)), Kind.POLICY))
    a_coin({field: artifact.model for field, artifact in artifacts.items()})
    check_inputs(context(tmp_path / "c", artifacts, config=Learner(reward_floor=None)), Kind.POLICY)


def test_a_folder_of_a_link_is_left_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_model)
    check_output(context(tmp_path, {}), "sft", Kind.POLICY, {})
    assert not (tiny_model / "align.json").exists()


@pytest.mark.parametrize("inject", [never_stop, poison, pad_with_eos])
def test_a_waived_fault_is_no_fact_for_the_next_stage(
    refused: Refused, inject: Callable[[dict[str, Path]], None], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    policy = artifacts["policy"]
    inject({"policy": policy.model})
    (policy.model / "align.json").unlink(missing_ok=True)
    with pytest.raises(UserError) as caught:
        check_output(context(policy.path, {}), "sft", Kind.POLICY, {})
    names = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    check_output(context(policy.path, {}, waive=names), "sft", Kind.POLICY, {})
    facts = read_facts(policy.model)
    assert facts is not None and not facts.turn_end and not facts.finite
    refused(lambda: check_inputs(context(tmp_path / "next", {"policy": policy}), Kind.POLICY))
