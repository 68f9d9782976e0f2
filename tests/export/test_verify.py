"""A folder that answers otherwise is found, with its place and its cause; one that answers alike is not accused.

Models answer in this process here, by the same code; ``tests/cli/test_export.py`` has the processes and vLLM.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.config.tuning import LoraTuning
from align.errors import StageFailed
from align.export import verify as verify_module
from align.export.answers import MAX_TOKENS, Job, JobResult
from align.export.export import Agreement, Source, export
from align.export.verify import QUESTIONS, TIE, JobFailed, execute, run_job, verify
from align.models.loading import load_policy, load_tokenizer, new_reward
from align.models.tuning.apply import apply_tuning, save_tuned
from tests.support.fork_server import Forking
from tests.support.refusals import Refused


def here(job: Job, scratch: Path) -> JobResult:
    assert job.engine == "transformers"
    return execute(job)


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))


def compared(source: Source, folder: Path, dtype: str = "float32", run: Any = here) -> Agreement:
    return verify(source, folder, dtype, folder.parent / "scratch", run=run, log=lambda text: None)


def written(source: Source, out: Path, dtype: str | None = None) -> Path:
    export(source, out, dtype)
    return out


def alter(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def adapter(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Adapters that change every answer."""
    lora = apply_tuning(model, LoraTuning(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_B" in name or "score.modules" in name:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    save_tuned(lora, tokenizer, folder / "model")
    return folder / "adapter"


def test_the_same_weights_give_the_same_tokens(tiny_model: Path, tmp_path: Path, no_vllm: None) -> None:
    comparison = compared(Source(tiny_model), written(Source(tiny_model), tmp_path / "out"))
    assert (comparison.what, comparison.prompts, comparison.ties, comparison.rounding) == (
        "tokens",
        len(QUESTIONS),
        0,
        None,
    )
    assert comparison.compared >= 32 * comparison.prompts and comparison.largest_gap == 0
    assert comparison.engines == [f"transformers {__import__('transformers').__version__}"]
    assert comparison.unchecked == "vLLM is not installed"


def test_an_adapter_s_merged_weights_answer_as_the_adapter_does(
    tiny_model: Path, tmp_path: Path, no_vllm: None
) -> None:
    source = Source(tiny_model, adapter(tmp_path, load_policy(tiny_model), load_tokenizer(tiny_model)))
    comparison = compared(source, written(source, tmp_path / "out"))
    assert 0 < comparison.largest_gap < 1e-4 and comparison.compared >= 32 * comparison.prompts


def test_rounded_weights_are_compared_with_rounded_ones(
    refused: Refused, tiny_model: Path, tmp_path: Path, no_vllm: None
) -> None:
    comparison = compared(Source(tiny_model), written(Source(tiny_model), tmp_path / "out", "bfloat16"), "bfloat16")
    assert comparison.largest_gap == 0 and comparison.rounding is not None and comparison.rounding > 0
    refused(lambda: compared(Source(tiny_model), tmp_path / "out", "float32"))


def test_reward_models_are_compared_by_score(
    tiny_model: Path, tiny_reward: Path, tmp_path: Path, no_vllm: None
) -> None:
    comparison = compared(Source(tiny_reward), written(Source(tiny_reward), tmp_path / "out"))
    assert (comparison.what, comparison.compared, comparison.largest_gap) == ("scores", len(QUESTIONS), 0)
    source = Source(tiny_model, adapter(tmp_path / "lora", new_reward(tiny_model), load_tokenizer(tiny_model)))
    for dtype in ("float32", "bfloat16"):
        compared(source, written(source, tmp_path / dtype, dtype), dtype)


def test_a_lost_adapter_is_found(refused: Refused, tiny_model: Path, tmp_path: Path, no_vllm: None) -> None:
    source = Source(tiny_model, adapter(tmp_path, load_policy(tiny_model), load_tokenizer(tiny_model)))
    written(Source(tiny_model), tmp_path / "out")  # the base alone
    refused(compared, source, tmp_path / "out")


def test_a_small_change_of_one_weight_is_found(
    refused: Refused, tiny_model: Path, tmp_path: Path, no_vllm: None
) -> None:
    folder = written(Source(tiny_model), tmp_path / "out")
    alter(folder, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor * 1.02)
    refused(lambda: compared(Source(tiny_model), folder))


def test_a_reward_model_s_other_head_is_found(
    refused: Refused, tiny_reward: Path, tmp_path: Path, no_vllm: None
) -> None:
    folder = written(Source(tiny_reward), tmp_path / "out")
    alter(folder, "score.weight", lambda tensor: tensor * 1.05)
    refused(lambda: compared(Source(tiny_reward), folder))


def test_another_template_is_found_before_any_model_is_asked(
    refused: Refused, tiny_model: Path, tmp_path: Path
) -> None:
    folder = written(Source(tiny_model), tmp_path / "out")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "assistant: "))

    def nobody(job: Job, scratch: Path) -> JobResult:
        raise AssertionError("asked")

    refused(lambda: compared(Source(tiny_model), folder, run=nobody))


# ---- where two engines part -----------------------------------------------------------------------------------------


class Engines:
    """transformers and vLLM whose answers are given: vLLM's differ at ``place`` of the first answer."""

    def __init__(self, place: int | None, apart: float, gap: float = 0.0, unusable: str | None = None) -> None:
        self.place, self.apart, self.gap, self.unusable = place, apart, gap, unusable
        self.asked: list[Job] = []

    def __call__(self, job: Job, scratch: Path) -> JobResult:
        self.asked.append(job)
        if job.want == "logprobs":
            values = [-1.0 - self.apart * (number % 2) for number in range(len(job.rows))]
            return JobResult("transformers 5", logprobs=[[value] for value in values])
        tokens = [[10 + place % 7 for place in range(MAX_TOKENS)] for _ in job.rows]
        logprobs = [[-1.0] * MAX_TOKENS for _ in job.rows]
        if job.engine == "vllm":
            if self.unusable:
                return JobResult(unusable=self.unusable)
            logprobs = [[-1.0 + self.gap] * MAX_TOKENS for _ in job.rows]
            if self.place is not None:
                tokens[0] = tokens[0][: self.place] + [99] * (MAX_TOKENS - self.place)
        return JobResult(f"{job.engine} 5", tokens, logprobs)


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find("json" if name == "vllm" else name, *rest)
    )


def test_tokens_of_equal_probability_part_by_chance(tiny_model: Path, with_vllm: None) -> None:
    engines = Engines(place=40, apart=TIE / 2, gap=1e-6)
    comparison = compared(Source(tiny_model), tiny_model, run=engines)
    assert (
        comparison.ties == 1
        and comparison.compared == 8 * MAX_TOKENS - 8
        and comparison.engines == ["transformers 5", "vllm 5"]
    )
    assert comparison.largest_gap == pytest.approx(1e-6, rel=1e-3) and comparison.unchecked is None
    request = engines.asked[-1]
    assert request.want == "logprobs" and request.folder == str(tiny_model)
    assert request.responses == [[10 + 40 % 7], [99]]
    assert request.rows[0] == request.rows[1] == [*engines.asked[0].rows[0], *(10 + place % 7 for place in range(40))]


def test_tokens_that_are_no_tie_are_a_difference_of_vllm(tiny_model: Path, with_vllm: None) -> None:
    with pytest.raises(StageFailed) as caught:
        compared(Source(tiny_model), tiny_model, run=Engines(place=40, apart=2 * TIE, gap=1e-6))
    text = str(caught.value)
    assert "vllm 5 differs from transformers 5 in 1 of 8 answers, first in answer 1 at position 41: token 99 " in text
    assert "0.002 nats apart" in text and "agree within 1e-06" in text
    assert "the files are right and vLLM computes something else" in text


def test_an_answer_that_ends_earlier_is_no_tie(refused: Refused, tiny_model: Path, with_vllm: None) -> None:
    engines = Engines(place=None, apart=0.0)

    def shorter(job: Job, scratch: Path) -> JobResult:
        done = engines(job, scratch)
        return done if job.engine != "vllm" else replace(done, tokens=[done.tokens[0][:5], *done.tokens[1:]])

    refused(lambda: compared(Source(tiny_model), tiny_model, run=shorter))


def test_ties_alone_prove_nothing(refused: Refused, tiny_model: Path, with_vllm: None) -> None:
    """A head of zeros ties everywhere: where most tokens could not be compared, nothing was checked."""

    def flat(job: Job, scratch: Path) -> JobResult:
        done = Engines(place=None, apart=0.0)(job, scratch)
        return done if job.engine != "vllm" else replace(done, tokens=[[99, *token[1:]] for token in done.tokens])

    refused(lambda: compared(Source(tiny_model), tiny_model, run=flat))


def test_a_vllm_that_does_not_import_is_said(tiny_model: Path, with_vllm: None) -> None:
    comparison = compared(Source(tiny_model), tiny_model, run=Engines(None, 0.0, unusable="vLLM does not import (x)"))
    assert comparison.unchecked == "vLLM does not import (x)" and comparison.engines == ["transformers 5"]


def test_a_model_that_vllm_cannot_run_is_kept_and_named(tiny_model: Path, with_vllm: None) -> None:
    engines = Engines(None, 0.0)

    def run(job: Job, scratch: Path) -> JobResult:
        if job.engine == "vllm":
            raise JobFailed(job, 1, "ValueError: head size 16 is not supported")
        return engines(job, scratch)

    agreement = compared(Source(tiny_model), tiny_model, run=run)
    assert agreement.unchecked == "vLLM cannot run it (ValueError: head size 16 is not supported)"
    assert agreement.engines == ["transformers 5"] and agreement.compared > 0


def test_a_folder_that_transformers_cannot_read_is_a_failure(
    refused: Refused, tiny_model: Path, with_vllm: None
) -> None:
    def run(job: Job, scratch: Path) -> JobResult:
        raise JobFailed(job, 1, "KeyError: 'lm_head'")

    refused(lambda: compared(Source(tiny_model), tiny_model, run=run))


def test_a_process_that_fails_is_quoted_by_its_last_line(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "subprocess", Forking())
    refused(lambda: run_job(Job("transformers", str(tmp_path / "nowhere"), "tokens", [[1, 2]]), tmp_path / "scratch"))
