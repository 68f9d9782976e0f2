"""Published results in the evidence for a GPU: which can run, what they measure, and their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_commands, gpu_proofs
from benchmarks.gpu_commands import Place, run_proof
from benchmarks.gpu_items import Item, Machine
from benchmarks.gpu_proofs import find_obstacle, proof_items
from benchmarks.gpu_results import Results
from benchmarks.gpu_table import make_table

CARD = Machine("cuda", tiny=False)
G1 = Path("pipelines/proof/g1_gsm8k.yaml")


def test_proofs_need_a_card_and_readable_repositories() -> None:
    assert {item.obstacle for item in proof_items(Machine("cpu", tiny=True))} == {"published results need a GPU"}
    obstacles = {item.name: item.obstacle for item in proof_items(CARD)}
    assert obstacles["g1_gsm8k"] == (
        "the Hub model Qwen/Qwen2.5-1.5B-Instruct is not in the Hub's cache and cannot be read"
    )
    assert "hf download Asap7772/cog_behav_all_strategies" in str(obstacles["g4_countdown"])


def test_proof_with_model_and_data_at_hand_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def find(name: str, commit: str, file: str, repo_type: str) -> Path | None:
        asked.append((name, file))
        return Path(file) if repo_type == "model" or name != "openai/gsm8k" else None

    monkeypatch.setattr(gpu_proofs, "small_file", find)
    assert find_obstacle(Path("pipelines/proof/g8_reverse_text.yaml"), CARD) is None
    assert ("PrimeIntellect/Reverse-Text-RL", "README.md") in asked
    assert "data" in str(find_obstacle(G1, CARD)) and ("openai/gsm8k", "README.md") in asked


def proof_result(name: str, stages: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def run(command: list[str], log: Path, seconds: float, **_: Any) -> int:
        assert command[4].endswith(f"pipelines/proof/{name}.yaml") and "runtime.device=cuda" in command
        log.write_text(json.dumps({"stages": stages}, indent=2))
        return 0

    monkeypatch.setattr(gpu_commands, "run_command", run)
    return run_proof(Item(name), Place(CARD, folder, ("stages.ppo.updates=1",)), 60)


def test_proof_reports_expected_and_measured_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = {"seconds": 2.0, "metrics": {}, "path": "somewhere"}
    monkeypatch.setattr(
        gpu_commands, "scores", lambda path: {"metric": "gsm8k_strict", "scores": {"grpo": [0.77, 0.75, 0.79]}}
    )
    scored = proof_result("g1_gsm8k", {"evaluate": evaluation}, tmp_path, monkeypatch)
    reward = {"seconds": 3.0, "path": "", "metrics": {"test_accuracy_after": 0.71, "test_loss_after": 0.5, "steps": 9}}
    trained = proof_result("g6_ultrafeedback", {"reward": reward}, tmp_path, monkeypatch)
    results = Results(tmp_path / "out")
    results.put("proof", "g1_gsm8k", scored)
    results.put("proof", "g6_ultrafeedback", trained)
    lines = make_table(results.parts).splitlines()
    assert (
        "| `g1_gsm8k` | GRPO with LoRA, Qwen2.5-1.5B-Instruct on GSM8K; expected accuracy 0.779. | "
        "gsm8k_strict: grpo 0.770 (0.750 to 0.790) | 2 |"
    ) in lines
    assert any("| test_loss_after 0.500, test_accuracy_after 0.710 | 3 |" in line for line in lines)
