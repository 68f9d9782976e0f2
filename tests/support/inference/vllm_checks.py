"""Checks of the vLLM engine that share one engine: ``python vllm_checks.py TINY_MODEL``. Run by ``test_vllm.py``."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from align.config.runtime import EngineConfig, Runtime
from align.config.tuning import LoraTuning
from align.inference.engine import open_engine
from align.inference.protocol import Sampling
from align.inference.trainer_engine import ParityError, policy_weights, probe, trainer_logprobs
from align.inference.vllm import VllmEngine, why_model_unusable
from align.inference.vllm_internals import (
    SHORT_LENGTH,
    VllmChanged,
    cpu_block_size,
    model_runner,
)
from align.inference.weights import AdaptedWeights, checkpoint_weights
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning
from align.models.tuning.peft_layers import merged_weights
from align.patches.vllm import rounds_to_nearest

sys.path.append(str(Path(__file__).resolve().parents[3]))
from tests.support.inference.vllm_session_checks import check_sessions
from tests.support.models.families import write_family
from tests.support.models.tuning.tuning_cases import CASES, push, tuning_of, wrapped

PROMPTS = [[1, 30 + i, 31, 32 + i] + [40 + i] * (3 * i) for i in range(8)]


def flat(draws: list[list[Any]]) -> list[Any]:
    return [response for some in draws for response in some]


def noisy(model_dir: Path, seed: int) -> Any:
    """A LoRA model after a pretended update."""
    model = apply_tuning(load_policy(model_dir), LoraTuning(rank=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def changed_head(model_dir: Path) -> Any:
    """Every row of the tied embeddings moved: what an old head left in place would miss."""
    model = load_policy(model_dir)
    generator = torch.Generator().manual_seed(5)
    weight = model.model.embed_tokens.weight
    weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def caller_is_undisturbed(model_dir: Path) -> VllmEngine:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    runtime = Runtime(engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1), threads=threads)
    engine = open_engine(model_dir, runtime, precision="float32", max_length=128, seed=7, warn=print)
    assert engine.name == "vllm"
    engine.generate(PROMPTS[:2], Sampling(4))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is setter
    assert isinstance(engine, VllmEngine)
    return engine


def models_that_it_cannot_run_are_named(model_dir: Path) -> None:
    """Before an engine is started, which would take half a minute to find out."""
    device = torch.device("cpu")
    assert why_model_unusable(model_dir, device) is None
    config = json.loads((model_dir / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(model_dir, Path(folder) / "model"))
        changed = copy / "config.json"
        changed.write_text(json.dumps({**config, "head_dim": 16}))
        assert "no attention for heads of 16 numbers, only of 32, 64" in str(why_model_unusable(copy, device))
        write_family("qwen3_next", copy.parent / "gated")
        reason = why_model_unusable(copy.parent / "gated", device, torch.float32)
        assert "layers with a state in bfloat16 only" in str(reason)
        write_family("lfm2", copy.parent / "lfm2", {"head_dim": 32})
        reason = why_model_unusable(copy.parent / "lfm2", device, torch.bfloat16)
        assert "convolutions of width 4 only" in str(reason)
        write_family("gpt_oss", copy.parent / "gpt_oss", {"head_dim": 32})
        assert "keeps the experts of GPT-OSS" in str(why_model_unusable(copy.parent / "gpt_oss", device))
        write_family("bamba", copy.parent / "bamba")
        assert "vLLM has no BambaForCausalLM" in str(why_model_unusable(copy.parent / "bamba", device))
        changed.write_text(json.dumps({**config, "architectures": ["OddForCausalLM"]}))
        assert "does not support the model" in str(why_model_unusable(copy, device))
        assert "OddForCausalLM" in str(why_model_unusable(copy, device))


def logprobs_are_the_models(engine: VllmEngine, model: Any) -> None:
    for temperature in (1.0, 0.7):
        actual = flat(engine.generate(PROMPTS, Sampling(16, temperature=temperature, seed=3)))
        ours = trainer_logprobs(model, PROMPTS, [entry.token_ids for entry in actual], temperature)
        theirs = torch.tensor([value for entry in actual for value in entry.logprobs])
        assert (ours - theirs).abs().max() < 1e-3, (ours - theirs).abs().max()
    scored = engine.score_tokens(PROMPTS, [[50, 51, 52]] * len(PROMPTS), 1.0)
    ours = trainer_logprobs(model, PROMPTS, [[50, 51, 52]] * len(PROMPTS), 1.0)
    assert (torch.tensor(scored).flatten() - ours).abs().max() < 1e-3


def samples_follow_their_seeds(engine: VllmEngine) -> None:
    first = engine.generate(PROMPTS, Sampling(16, n=2, seed=3))
    again = engine.generate(PROMPTS, Sampling(16, n=2, seed=3))
    second = engine.generate(PROMPTS, Sampling(16, n=2, seed=4))
    tokens = [[response.token_ids for response in flat(draws)] for draws in (first, again, second)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert first[0][0].token_ids != first[0][1].token_ids
    for response in flat(first):
        assert response.finished == (response.token_ids[-1] == 2)
        assert len(response.logprobs) == len(response.token_ids)


def frequencies_follow_the_model(engine: VllmEngine, model: Any) -> None:
    """4,000 first tokens against the model's distribution: total variation as small as chance makes it."""
    draws = 4000
    actual = flat(engine.generate(PROMPTS[:1], Sampling(1, n=draws, seed=1)))
    counts = torch.bincount(torch.tensor([entry.token_ids[0] for entry in actual]), minlength=260) / draws
    with torch.no_grad():
        wanted = model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1)
    # the expected distance of a sample from its own distribution is about sum sqrt(p (1 - p) / n) / sqrt(2 pi)
    chance = (wanted * (1 - wanted) / draws).sqrt().sum() * 0.4
    distance = 0.5 * (counts - wanted).abs().sum()
    assert distance < 1.5 * chance, (distance, chance)


def more_prompt_tokens_than_a_step_takes(engine: VllmEngine) -> None:
    """Seeded requests whose prompts do not all fit into one step: read in parts, they crashed vLLM's CPU sampler."""
    prompts = [[1, *((7 * i + 3 * index) % 250 + 3 for index in range(110))] for i in range(128)]
    actual = flat(engine.generate(prompts, Sampling(2, seed=1)))
    assert len(actual) == 128 and all(entry.token_ids for entry in actual)


def weights_are_taken_over(engine: VllmEngine, model_dir: Path) -> None:
    for model in (noisy(model_dir, 1), noisy(model_dir, 2), changed_head(model_dir)):
        try:
            probe(engine, model, PROMPTS)
        except ParityError as error:
            assert "weights not loaded" in str(error)
        else:
            raise AssertionError("the probe did not notice that the weights were not loaded")
        engine.load_weights(merged_weights(model))
        assert probe(engine, model, PROMPTS).mean_gap < 1e-4


def weights_of_every_tuning_are_taken_over(engine: VllmEngine, model_dir: Path) -> None:
    """What a model in training answers, its merged weights answer here."""
    for name in ("qdora", "loftq", "pissa_dora", "embeddings", "ia3", "oft", "ln_tuning"):
        model = wrapped(model_dir, tuning_of(CASES[name]))
        push(model)
        engine.load_weights(merged_weights(model))
        gap = probe(engine, model, PROMPTS).mean_gap
        assert gap < 1e-4, (name, gap)
    engine.load_weights(checkpoint_weights(model_dir))


def adapters_are_taken_over_alone(engine: VllmEngine, model_dir: Path) -> None:
    """Only changed layers are loaded, and every token has the log-probability that merged weights give it."""
    for name in ("rslora", "last_pissa", "tokens", "embeddings", "nf4"):
        model = wrapped(model_dir, tuning_of(CASES[name]))
        engine.load_weights(policy_weights(model))
        push(model)
        weights = policy_weights(model)
        assert isinstance(weights, AdaptedWeights)
        held = engine.held.key
        engine.load_weights(weights)
        assert held is engine.held.key is model
        gap = probe(engine, model, PROMPTS).mean_gap
        assert gap < 1e-4, (name, gap)
        adapted = engine.generate(PROMPTS, Sampling(16, seed=3))
        engine.load_weights(merged_weights(model))
        assert engine.held.key is None
        assert adapted == engine.generate(PROMPTS, Sampling(16, seed=3)), name
    engine.load_weights(checkpoint_weights(model_dir))


def tied_head_may_be_left_out_by_the_caller(engine: VllmEngine, model_dir: Path) -> None:
    model = changed_head(model_dir)
    engine.load_weights(checkpoint_weights(model_dir))
    engine.load_weights(pair for pair in merged_weights(model) if pair[0] != "lm_head.weight")
    assert probe(engine, model, PROMPTS).mean_gap < 1e-4


def left_out_head_is_caught(engine: VllmEngine, model_dir: Path) -> None:
    """Without our completion vLLM keeps its packed copy of the old head; only the probe can see it."""
    model = changed_head(model_dir)
    engine.load_weights(checkpoint_weights(model_dir))
    engine.tied = False
    engine.load_weights(pair for pair in merged_weights(model) if pair[0] != "lm_head.weight")
    engine.tied = True
    try:
        probe(engine, model, PROMPTS)
    except ParityError as error:
        assert "tied output head" in str(error)
    else:
        raise AssertionError("an old head went unnoticed")


def missing_weight_is_an_error(engine: VllmEngine, model_dir: Path) -> None:
    try:
        engine.load_weights(pair for pair in checkpoint_weights(model_dir) if pair[0] != "model.norm.weight")
    except ValueError as error:
        assert "model.norm.weight" in str(error)
    else:
        raise AssertionError("a missing weight went unnoticed")
    engine.load_weights(checkpoint_weights(model_dir))


def corrupted_tensor_is_caught(engine: VllmEngine, model_dir: Path) -> None:
    weights = dict(checkpoint_weights(model_dir))
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] * 1.5
    engine.load_weights(weights.items())
    try:
        probe(engine, load_policy(model_dir), PROMPTS)
    except ParityError:
        engine.load_weights(checkpoint_weights(model_dir))
        return
    raise AssertionError("a corrupted tensor went unnoticed")


def samples_share_a_short_prompt(engine: VllmEngine, model_dir: Path) -> None:
    """Of 20 tokens four samples read 16 once, where the processor's kernel takes such blocks."""
    if cpu_block_size(model_dir, engine.dtype, engine.max_length) == 32:
        return
    prompt, scheduled = [[7 + token for token in range(20)]], []
    executor = engine.llm.llm_engine.engine_core.engine_core.model_executor
    execute = executor.execute_model

    def count(output: Any, *args: Any, **options: Any) -> Any:
        scheduled.append(output.total_num_scheduled_tokens)
        return execute(output, *args, **options)

    executor.execute_model = count
    drawn = flat(engine.generate(prompt, Sampling(3, n=4, seed=5)))
    executor.execute_model = execute
    assert scheduled[0] == 20 + 3 * 4, scheduled
    for response in drawn:
        # Read from the cache or not, the states are those of the model.
        (expected,) = engine.score_tokens(prompt, [response.token_ids], 1.0)
        assert np.allclose(response.logprobs, expected, atol=2e-3), (response.logprobs, expected)


def long_sequences_keep_the_blocks_of_amx(model_dir: Path) -> None:
    from vllm.v1.attention.backends import cpu_attn

    backend, kernel_of = cpu_attn.CPUAttentionBackend, cpu_attn._get_attn_isa
    sizes_before = backend.get_supported_kernel_block_sizes
    cpu_attn._get_attn_isa = lambda dtype, block_size, head_size, kv_cache_dtype=None: (
        "vec16" if block_size == 16 else "amx"
    )
    try:
        sizes = [cpu_block_size(model_dir, torch.bfloat16, length) for length in (SHORT_LENGTH, SHORT_LENGTH + 1)]
    finally:
        cpu_attn._get_attn_isa = kernel_of
        backend.get_supported_kernel_block_sizes = staticmethod(sizes_before)
    assert sizes == [16, 32], sizes


def changed_insides_fail_loudly() -> None:
    for broken in (object(), type("LLM", (), {"llm_engine": object()})()):
        try:
            model_runner(broken)
        except VllmChanged as error:
            assert "set runtime.engine.name to transformers" in str(error)
        else:
            raise AssertionError("a changed vLLM went unnoticed")


def norms_run_by_kernels(engine: VllmEngine) -> None:
    """A CPU's norms go to vLLM's C++ kernels, whose results are right to a rounding; other tensors go its own way."""
    if not torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            engine.generate(PROMPTS[:1], Sampling(2, seed=1))
        names = {event.key for event in trace.key_averages()}
        # Kernels that cut digits off, as those for AVX2 do, are for float32 only.
        is_exact = engine.dtype != torch.bfloat16 or rounds_to_nearest(torch.ops._C)
        assert ({"_C::rms_norm", "_C::fused_add_rms_norm"} <= names) == is_exact, names
    _norms_are_right(torch.float32, rtol=1e-5)
    # A rounding to bfloat16 is at most 2**-8. The kernels round the sum and the result. vLLM's own operations, which
    # take bfloat16 if the kernels would cut its digits off, also round before the weight.
    roundings = 2 if rounds_to_nearest(torch.ops._C) else 3
    _norms_are_right(torch.bfloat16, rtol=roundings * 2**-8)


def _norms_are_right(dtype: torch.dtype, rtol: float) -> None:
    from vllm.ir import ops

    generator = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(5, 64, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(64, generator=generator).to(dtype)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        return rows / (rows.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    def is_near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
        return torch.allclose(actual.double(), expected, rtol=rtol, atol=1e-6)

    assert is_near(ops.rms_norm(x, weight, 1e-5), norm(x))
    # Rows that do not lie one after the other.
    assert is_near(ops.rms_norm(x.t().contiguous().t(), weight, 1e-5), norm(x))
    total = (x.float() + residual.float()).to(dtype)
    actual, summed = ops.fused_add_rms_norm.maybe_inplace(x.clone(), residual.clone(), weight, 1e-5)
    gap = ((actual.double() - norm(total)) / norm(total)).abs().max().item()
    assert torch.equal(summed, total), (dtype, (summed.double() - total.double()).abs().max().item(), gap)
    assert is_near(actual, norm(total)), (dtype, gap)


def progress_is_told(engine: VllmEngine) -> None:
    calls: list[tuple[int, int]] = []
    engine.generate(PROMPTS, Sampling(4, n=2), lambda done, total: calls.append((done, total)))
    assert calls[-1] == (16, 16)


def a_hang_is_noticed(engine: VllmEngine) -> None:
    """Every step is progress; a step that takes longer than the timeout is told of, with its stack."""
    before = engine.watchdog._progress
    (first,) = flat(engine.generate(PROMPTS[:1], Sampling(12, seed=1)))
    assert engine.watchdog._progress - before >= len(first.token_ids), (engine.watchdog._progress, before)
    core = engine.llm.llm_engine.engine_core.engine_core
    step, timeout = core.step_fn, engine.watchdog.timeout

    def late() -> Any:
        time.sleep(0.15)
        return step()

    core.step_fn = late
    for seconds, expected in ((1.0, False), (0.05, True)):
        engine.watchdog.timeout = seconds
        with tempfile.TemporaryFile("w+") as file, contextlib.redirect_stderr(file):
            engine.generate(PROMPTS[:1], Sampling(12, seed=1))
            file.seek(0)
            rows = file.read()
        assert ("the vllm engine made no progress in 'generate'" in rows) == expected, rows
        assert ("in late" in rows) == expected, rows
    core.step_fn, engine.watchdog.timeout = step, timeout


def training_still_works(model_dir: Path) -> None:
    """Gradients and a second backend call after the engine ran in inference mode."""
    model = load_policy(model_dir).train()
    ids = torch.tensor(PROMPTS[:1])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.norm.weight.grad is not None


def main(model_dir: Path) -> None:
    engine = caller_is_undisturbed(model_dir)
    models_that_it_cannot_run_are_named(model_dir)
    model = load_policy(model_dir)
    logprobs_are_the_models(engine, model)
    samples_follow_their_seeds(engine)
    frequencies_follow_the_model(engine, model)
    more_prompt_tokens_than_a_step_takes(engine)
    weights_are_taken_over(engine, model_dir)
    weights_of_every_tuning_are_taken_over(engine, model_dir)
    adapters_are_taken_over_alone(engine, model_dir)
    tied_head_may_be_left_out_by_the_caller(engine, model_dir)
    left_out_head_is_caught(engine, model_dir)
    missing_weight_is_an_error(engine, model_dir)
    corrupted_tensor_is_caught(engine, model_dir)
    samples_share_a_short_prompt(engine, model_dir)
    check_sessions(engine, PROMPTS)
    long_sequences_keep_the_blocks_of_amx(model_dir)
    changed_insides_fail_loudly()
    norms_run_by_kernels(engine)
    progress_is_told(engine)
    a_hang_is_noticed(engine)
    training_still_works(model_dir)
    engine.close()
    print("all checks passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
