"""One engine for several checkpoints: weights handed over, finished checkpoints not sampled again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align.config.runtime import Runtime
from align.evaluation.plan import render_for_all
from align.evaluation.systems import Policy, ResponseCache, Sampler, make_systems
from align.evaluation.tasks.records import draw
from align.inference.protocol import Response, Sampling
from align.inference.weights import checkpoint_weights


class Words:
    """A tokenizer of the fewest words: id → letter, ids under 3 are special."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(94 + i) for i in ids if not skip_special_tokens or i >= 3)

    def apply_chat_template(self, messages, **options):
        return list(range(len(messages[-1]["content"])))


class FakeEngine:
    """Answers with the number that its weights hold."""

    name = "fake"

    def __init__(self, model_dir: Path, log: list[str]) -> None:
        self.log = log
        self.load_weights(checkpoint_weights(model_dir))
        log[-1] = f"open {self.answer}"

    def generate(self, prompts, sampling, on_progress=None):
        self.log.append(f"generate {self.answer}")
        if on_progress:
            on_progress(len(prompts) * sampling.n, len(prompts) * sampling.n)
        response = Response([self.answer, 2], [-1.0, -0.5], True, "not this text")
        return [[response] * sampling.n for _ in prompts]

    def load_weights(self, weights):
        self.answer = int(dict(weights)["answer"].item())
        self.log.append(f"load {self.answer}")

    def close(self):
        self.log.append("close")


@pytest.fixture
def checkpoint(tmp_path):
    def make(answer: int, layers: int = 1) -> Policy:
        folder = tmp_path / f"model{answer}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"layers": layers, "transformers_version": str(answer)}))
        save_file({"answer": torch.tensor(float(answer))}, folder / "model.safetensors")
        return Policy(f"p{answer}", folder, f"key{answer}", Words())

    return make


def generate(policies, folder, log, warnings=None, observations=None):
    prompts = {policy.name: [[7, 8], [9]] for policy in policies}

    def opened(path, runtime):
        (observations if observations is not None else []).append(runtime.engine.name)
        return FakeEngine(path, log)

    sampler = Sampler(
        policies,
        Runtime(),
        opened,
        ResponseCache(folder, print),
        warn=(warnings if warnings is not None else []).append,
        progress=lambda done, total: log.append(f"{done}/{total}"),
    )
    sampler.expect(4 * len(policies))
    values = {
        entry.name: sampler.generate(entry, prompts[entry.name], Sampling(max_tokens=4, n=2)) for entry in policies
    }
    sampler.close()
    return values


def test_one_engine_gets_the_next_weights(checkpoint, tmp_path):
    log: list[str] = []
    response_set = generate([checkpoint(5), checkpoint(6)], tmp_path, log)
    assert [line for line in log if "/" not in line] == ["open 5", "generate 5", "load 6", "generate 6", "close"]
    assert [line for line in log if "/" in line] == ["4/8", "4/8", "8/8", "8/8"]
    # decoded with the policy's own tokenizer, special ids left out
    assert response_set["p6"].responses[1][1].text == "d"
    assert len(response_set["p6"].responses) == 2


def test_a_finished_checkpoint_is_read_back(checkpoint, tmp_path):
    first, second = checkpoint(5), checkpoint(6)
    before = generate([first], tmp_path, [])
    log: list[str] = []
    after = generate([first, second], tmp_path, log)
    assert "generate 5" not in log
    assert after["p5"] == before["p5"]
    log.clear()
    generate([first, second], tmp_path, log)
    assert log == ["4/8", "8/8"]  # no engine at all


def test_other_weights_or_a_damaged_file_are_sampled_again(checkpoint, tmp_path):
    policy = checkpoint(5)
    generate([policy], tmp_path, [])
    log: list[str] = []
    generate([Policy(policy.name, policy.model_dir, "other key", policy.tokenizer)], tmp_path, log)
    assert "generate 5" in log
    for damage in ('{"identity"', ""):
        for file in tmp_path.glob("*.jsonl"):
            file.write_text(damage)
        log.clear()
        generate([policy], tmp_path, log)
        assert "generate 5" in log
    full = {file: file.read_text() for file in tmp_path.glob("*.jsonl")}
    for file, text in full.items():  # a line short
        file.write_text("\n".join(text.splitlines()[:-1]) + "\n")
    log.clear()
    generate([policy], tmp_path, log)
    assert "generate 5" in log


def test_second_architecture_uses_transformers_engine_for_all(checkpoint, tmp_path):
    log, warnings, observations = [], [], []
    generate([checkpoint(5), checkpoint(6, layers=2)], tmp_path, log, warnings, observations)
    assert observations == ["transformers", "transformers"]
    assert "architecture" in warnings[0]
    assert [line for line in log if "/" not in line] == [
        "open 5", "generate 5", "close", "open 6", "generate 6", "close",
    ]  # fmt: skip


def test_rows_are_chosen_by_seed_and_kept_in_order():
    rows = [{"id": str(i)} for i in range(50)]
    chosen = draw(rows, 10, 3)
    assert chosen == draw(rows, 10, 3)
    assert chosen != draw(rows, 10, 4)
    assert [int(row["id"]) for row in chosen] == sorted(int(row["id"]) for row in chosen)
    assert draw(rows, None, 0) == rows


def test_a_prompt_too_long_for_one_checkpoint_is_dropped_for_all(checkpoint, tmp_path):
    class Wordy(Words):
        def apply_chat_template(self, messages, **options):
            return [1, 1, *super().apply_chat_template(messages)]

    plain, wordy = checkpoint(5), checkpoint(6)
    wordy = Policy(wordy.name, wordy.model_dir, wordy.key, Wordy())
    rows = [{"prompt": [{"role": "user", "content": "x" * size}]} for size in (3, 5)]
    systems = make_systems([plain, wordy], None, {}, tmp_path)
    remaining, prompts, dropped = render_for_all(rows, systems, 5)
    assert (remaining, dropped) == (rows[:1], 1)
    assert {name: len(ids) for name, ids in prompts.items()} == {"p5": 1, "p6": 1}
