"""Stages that sample and score, by hand: a model whose bytes can be counted on one's fingers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from align.capacity.hardware import GIB, parse_hardware
from align.capacity.sampling import (
    Inference,
    SamplingLoad,
    ScoringLoad,
    counted_engine,
    reward_scoring,
    sampling_memory,
    sampling_notes,
    sampling_way,
    scoring_memory,
)
from align.config.runtime import Runtime
from align.models.compute.model_types import architecture_of
from tests.support.capacity.models import MISTRAL, TOY

# TOY: hidden 4, 2 layers of 29 (a matrix 4 x 5 with bias, a norm of 4), keys 3, 10 words, trunk 102, head 40.
LOAD = SamplingLoad("policy", TOY, prompt_tokens=6, response_tokens=2, call=40)
LARGE = architecture_of(MISTRAL)


def runtime(name: str = "transformers", **blocks: Any) -> Runtime:
    engine = {"name": name, **blocks.pop("engine", {})}
    return Runtime.model_validate({"device": "cuda", "engine": engine, **blocks})


def inference(load: SamplingLoad = LOAD, *scoring: ScoringLoad, precision: Any = "float32") -> Inference:
    return Inference(precision, (load,), scoring)


def large(prompt: int = 1000) -> Inference:
    return inference(SamplingLoad("policy", LARGE, prompt, 24, call=4000), precision="bfloat16")


def test_bytes_of_an_engine_by_hand() -> None:
    way = sampling_memory(LOAD, runtime(), "bfloat16", 5, "transformers", gpu=True)
    assert way["engine"] == 2 * 142
    assert way["kv_cache"] == 2 * 2 * 3 * 2 * 5 * 8  # keys and values, 2 bytes, 3 features, 2 layers, 5 x 8 tokens
    # 5 prompts of 6 tokens in one pass: 2 x 4 features that flow, 4 x 4 + 2 x 3 in attention; a mask of 3 bytes a pair
    assert way["activations"] == 30 * 2 * (8 + 22) + 3 * 5 * 6 * 6
    assert way["logits"] == 5 * 10 * (2 + 12)
    cut = sampling_memory(replace(LOAD, uses_top_p=True), runtime(), "bfloat16", 5, "transformers", gpu=True)
    assert cut["logits"] == 5 * 10 * (2 + 28)


def test_vllm_limits_prompt_tokens_and_reserves_its_cache() -> None:
    long = replace(LOAD, prompt_tokens=10_000)
    many = [
        sampling_memory(long, runtime("vllm", device=device), "float32", 5, "vllm", gpu=device == "cuda")
        for device in ("cuda", "cpu")
    ]
    assert [parts["activations"] for parts in many] == [
        16384 * 4 * 30,
        10_002 * 4 * 30,
    ]  # a prompt is read in one step
    assert many[1]["kv_cache"] == GIB


def test_bytes_of_scoring_by_hand() -> None:
    reward = scoring_memory(reward_scoring("reward", TOY, 8), "bfloat16")
    assert reward == {
        "reward": 4 * (102 + 4), "copies": 2 * 25,
        "activations": 32 * 8 * (4 * 8 + 2 * 22), "logits": 0,
    }  # fmt: skip
    load = ScoringLoad("sft", TOY, 8, 16, logit_tokens=2, is_rounded=True)
    requested = scoring_memory(load, "float32")
    assert (requested["weights"], requested["copies"], requested.get("file")) == (4 * 142, 0, None)
    rounded = scoring_memory(load, "bfloat16")
    assert (rounded["weights"], rounded["copies"], rounded["file"]) == (2 * 142, 0, 4 * 142)
    assert scoring_memory(load, "bfloat16", gpu=True)["file"] == 0
    # an embedding that scales its 10 rows of 4 features stays float32; the head that is tied to it is cast in a pass
    scaled = replace(load, model=replace(TOY, scaled_embeddings=True, tied=True))
    rounded = scoring_memory(scaled, "bfloat16")
    assert (rounded["weights"], rounded["copies"]) == (2 * 62 + 4 * 40, 2 * 40)
    assert requested["logits"] == 2 * 4 * 4 * 10 + 12 * 4 * 10  # two rows of 8 tokens in a pass, two words each


def test_batch_is_what_the_settings_ask_for() -> None:
    hardware = parse_hardware("h100")
    way = sampling_way(inference(), runtime(engine={"batch_size": 8}), hardware)
    assert (way.batch, way.wanted, way.phase, way.label) == (8, 8, "sampling", "one engine (transformers)")
    assert way.parts["kv_cache"] == 2 * 2 * 3 * 4 * 8 * 8
    assert sampling_way(inference(replace(LOAD, call=4)), runtime("vllm"), hardware).batch == 4


@pytest.mark.parametrize(
    ("blocks", "engine"),
    [
        ({"name": "transformers"}, "transformers"),
        ({"name": "vllm"}, "vllm"),
        ({"name": "auto", "rollouts": {"servers": 2}}, "vllm"),
        ({"name": "auto", "rollouts": {"servers": 1, "tensor_parallel": 2}}, None),
        ({"name": "auto", "rollouts": {"addresses": ["http://127.0.0.1:8000"]}}, None),
        ({"name": "vllm", "executor": {"name": "ray", "samplers": {"count": 9}}}, "vllm"),
    ],
)
def test_counted_engine_follows_the_runtime(blocks: Any, engine: str | None) -> None:
    assert counted_engine(runtime(**blocks)) == engine


def test_one_of_several_engines_is_counted() -> None:
    hardware = parse_hardware("2xh100")
    servers = runtime("auto", rollouts={"servers": 2})
    assert "Of 2 engines, one is counted." in sampling_notes(large(), servers, hardware)
    assert sampling_way(large(), servers, hardware).parts == sampling_way(large(), runtime("vllm"), hardware).parts


def test_largest_batch_fills_vllm_s_share() -> None:
    hardware = parse_hardware("h100")
    way = sampling_way(large(), runtime("vllm", engine={"gpu_memory": 0.35}), hardware)
    assert 0 < way.batch == way.largest < 128
    share = int(0.35 * hardware.device.memory)
    each = 2 * 2 * 1024 * 32 * 1024 + 32000 * 14  # a sequence's cache of 1,024 tokens, and its logits
    assert way.peak <= share < way.peak + each
    more = sampling_way(large(), runtime("vllm", engine={"gpu_memory": 0.9}), hardware)
    assert more.batch == 128 < more.largest


def test_engine_that_exceeds_its_share_is_refused() -> None:
    hardware = parse_hardware("a100-40")
    way = sampling_way(large(), runtime("vllm", engine={"gpu_memory": 0.35}), hardware)
    reason = "one sequence of 1024 tokens needs 14.4 GiB, the engine has 13.8 (runtime.engine.gpu_memory 0.35)"
    assert way.obstacle == reason and way.batch == 0
    assert sampling_way(large(), runtime("vllm"), parse_hardware("l40s")).fits
    assert sampling_way(large(), runtime("vllm", engine={"gpu_memory": 0.9}), hardware).fits


def test_cache_smaller_than_one_sequence_is_refused_on_a_cpu() -> None:
    hardware = parse_hardware("cpu-64")
    small = runtime("vllm", device="cpu", engine={"cpu_kv_cache_gb": 0.1})
    assert sampling_way(large(), small, hardware).obstacle == (
        "one sequence of 1024 tokens does not fit into a cache of 0.1 GiB (runtime.engine.cpu_kv_cache_gb)"
    )
    roomy = sampling_way(large(), runtime("vllm", device="cpu"), hardware)
    assert roomy.batch == 8 and not roomy.obstacle  # 1 GiB holds eight of 128 MiB


def test_reward_model_that_exceeds_the_device_is_refused() -> None:
    hardware = parse_hardware("l4")
    load = replace(large(), scoring=(reward_scoring("reward", LARGE, 1024),))
    way = sampling_way(load, runtime("vllm", engine={"gpu_memory": 0.9}), hardware)
    assert way.obstacle.startswith("scoring by reward needs ") and way.obstacle.endswith("usable are 20.9")
    assert way.largest > 0 and way.batch == 0


def test_stage_that_only_reads_needs_no_engine() -> None:
    load = Inference("float32", (), (ScoringLoad("sft", TOY, 8, 16, 8),))
    way = sampling_way(load, runtime(), parse_hardware("h100"))
    assert (way.label, way.phase, way.engine, way.batch) == ("one device", "reading by sft", None, 0)


def test_mapped_file_fills_only_free_memory() -> None:
    load = inference(SamplingLoad("policy", LARGE, 6, 2, call=1), precision="bfloat16")
    settings = runtime(device="cpu")
    roomy, tight = (sampling_way(load, settings, parse_hardware(text)) for text in ("cpu-64", "cpu-20"))
    assert roomy.phase == tight.phase == "loading" and not roomy.obstacle and not tight.obstacle
    assert roomy.parts["file"] == 4 * LARGE.parameters and roomy.parts["engine"] == 2 * LARGE.parameters
    assert tight.peak == tight.parts["context"] + parse_hardware("cpu-20").device.usable
    plain = sampling_way(replace(load, precision="float32"), settings, parse_hardware("cpu-64"))
    assert plain.phase == "sampling"
