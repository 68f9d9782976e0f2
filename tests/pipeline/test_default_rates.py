"""``learning_rate: auto``: values by kind, tuning and number of parameters, which stand in keys and plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from align import Pipeline
from align.cli.main import main
from align.config.stages.best_of_n import RejectionConfig
from align.config.stages.policy_gradient import GrpoConfig, PpoConfig
from align.config.stages.preference import DpoConfig, OrpoConfig
from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.stages.training import DefaultRates
from align.config.tuning import AdaptersTuning, FullTuning, Ia3Tuning, LoraTuning, QloraTuning, TuningBase
from align.config.yaml import dump_yaml
from align.models.model_plan import known_parameters
from tests.support.refusals import Refused

LORA = {"method": "lora", "rank": 4}
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


def raw(source: str = "tiny", /, **stages: dict[str, Any]) -> dict[str, Any]:
    first = {"model": {"source": source}, "data": {"recipe": "data_recipes/embedded.yaml"}}
    return {"name": "run", "stages": {**first, "sft": {"model": "model", "data": "data", "tuning": LORA}, **stages}}


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Write a checkpoint with this config and 32 tensors of 2 x 3 elements."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    save_file({f"layers.{index}": np.zeros((2, 3), np.float32) for index in range(32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config_class", "tuning", "parameters", "rate"),
    [
        (SftConfig, LoraTuning(), 135e6, 1e-3),
        (SftConfig, QloraTuning(), 2e9, 1e-3),
        (SftConfig, LoraTuning(), 2.83e9, 5.5e-4),  # halfway between 2 and 4 billion: the geometric mean
        (SftConfig, LoraTuning(), 4e9, 3e-4),
        (SftConfig, LoraTuning(), 70e9, 3e-4),
        (SftConfig, FullTuning(), 135e6, 1e-4),
        (SftConfig, FullTuning(), 7e9, 3e-5),
        (SftConfig, Ia3Tuning(), 135e6, 7.5e-3),
        (SftConfig, AdaptersTuning(position="sequential"), 135e6, 7.5e-4),
        (RewardConfig, LoraTuning(), 7e9, 3e-4),
        (DpoConfig, LoraTuning(), 135e6, 3e-4),
        (DpoConfig, LoraTuning(), 7e9, 5e-6),
        (DpoConfig, FullTuning(), 7e9, 5e-7),
        (OrpoConfig, FullTuning(), 7e9, 5e-6),
        (GrpoConfig, LoraTuning(), 7e9, 1e-5),
        (GrpoConfig, FullTuning(), 7e9, 1e-6),
        (PpoConfig, FullTuning(), 135e6, 3e-5),
        (RejectionConfig, LoraTuning(), 135e6, 5e-4),
    ],
)
def test_default_rate_follows_kind_tuning_and_size(
    config_class: type[DefaultRates], tuning: TuningBase, parameters: float, rate: float
) -> None:
    assert config_class.rates.choose(tuning, int(parameters)) == rate


PPO = {"policy": "sft", "prompts": "data", "score": "align.data.checkers:sentence_count", "learning_rate": 1e-5}


def test_critic_has_a_rate_of_its_own_by_default() -> None:
    unset, number, null = (
        Pipeline(raw(ppo={**PPO, "tuning": LORA, **rate})).nodes["ppo"].config
        for rate in ({}, {"critic_learning_rate": 1e-3}, {"critic_learning_rate": None})
    )
    assert [config.critic_learning_rate for config in (unset, number, null)] == [5e-4, 1e-3, None]  # type: ignore[attr-defined]
    assert null.critic_rate(1) == 1e-5  # type: ignore[attr-defined]
    # A script knows no pipeline, and keeps the policy's rate.
    assert PpoConfig.for_trainer(learning_rate=1e-5).critic_rate(1) == 1e-5
    assert PpoConfig(policy="p", prompts="d", score="m:f", learning_rate=1e-5).critic_rate(135_000_000) == 5e-5


def test_critic_of_a_model_of_unknown_size_has_the_policys_rate(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def ppo(**rates: Any) -> Any:
        model = {"source": "some/model", "revision": "0" * 40}
        sft = {"model": "model", "data": "data", "learning_rate": 1e-3}
        return Pipeline(raw(model=model, sft=sft, ppo={**PPO, **rates})).nodes["ppo"].config

    refused(ppo, critic_learning_rate="auto")
    assert ppo().critic_learning_rate is None


def test_auto_shares_the_key_of_its_value() -> None:
    unset, auto, number, other = (
        Pipeline(raw(sft={"model": "model", "data": "data", "tuning": LORA, **rate})).nodes["sft"]
        for rate in ({}, {"learning_rate": "auto"}, {"learning_rate": 1e-3}, {"learning_rate": 9e-4})
    )
    assert unset.key == auto.key == number.key != other.key
    assert unset.parts["config"]["learning_rate"] == 1e-3
    full = Pipeline(raw(sft={"model": "model", "data": "data"})).nodes["sft"]
    assert full.parts["config"]["learning_rate"] == 1e-4


def test_later_stages_take_the_size_of_the_first_model() -> None:
    online = {"policy": "sft", "prompts": "data", "score": "gold", "tuning": LORA}
    values: dict[str, dict[str, Any]] = {
        "grpo": online,
        "ppo": {**online, "critic_learning_rate": "auto"},
        "same": {**online, "stage": "ppo", "learning_rate": 3e-4, "critic_learning_rate": 5e-4},
        "plain": {**online, "stage": "ppo", "critic_learning_rate": None},
        "more": {"continue_from": "grpo", "updates": 200},
    }
    nodes = Pipeline(raw(**values)).nodes
    assert [nodes[name].parts["config"]["learning_rate"] for name in values] == [3e-4] * 5
    assert nodes["ppo"].key == nodes["same"].key != nodes["plain"].key


def test_plan_shows_the_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(dump_yaml(raw(data={"recipe": str(Path("data_recipes/embedded.yaml").absolute())})))
    assert main(["plan", str(path), "--store", str(tmp_path / "store")]) == 0
    assert "sft takes learning_rate: 0.001\n" in capsys.readouterr().out


def test_size_of_a_folder_comes_from_its_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", LLAMA_7B)
    assert 6.7e9 < known_parameters(str(folder), None, tmp_path) < 6.8e9
    assert Pipeline(raw(str(folder))).nodes["sft"].parts["config"]["learning_rate"] == 3e-4


def test_size_of_an_unknown_type_comes_from_file_headers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"model_type": "unheard_of"})
    assert known_parameters(str(folder), None, tmp_path) == 192
    assert Pipeline(raw(str(folder))).nodes["sft"].parts["config"]["learning_rate"] == 1e-3


def test_unknown_size_asks_for_a_number(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    absent = {"model": {"source": "some/model", "revision": "0" * 40}}
    refused(known_parameters, "some/model", "0" * 40, tmp_path)
    refused(lambda: Pipeline(raw(**absent)))
    number = {"model": "model", "data": "data", "learning_rate": 1e-3}
    assert Pipeline(raw(**absent, sft=number)).nodes["sft"].parts["config"]["learning_rate"] == 1e-3
