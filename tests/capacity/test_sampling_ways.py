"""Stages that sample and score, by hand: a model whose bytes and operations can be counted on one's fingers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from align.capacity.hardware import GIB, Hardware, parse_hardware
from align.capacity.inference import (
    Inference,
    Rows,
    SamplingLoad,
    ScoringLoad,
    reward_scoring,
    sampling_memory,
    scoring_memory,
)
from align.capacity.layouts import (
    EngineLayout,
    candidate_layouts,
    requested_layout,
    tensor_parallel_bytes,
    tensor_parallel_obstacle,
)
from align.capacity.sampling_ways import sampling_remedies, sampling_way, sampling_ways
from align.capacity.timing import ASSUMED, HOP
from align.config.runtime import Runtime
from align.models.architecture import Architecture, architecture_of
from align.models.flops import forward_flops
from tests.support.capacity.models import MISTRAL, SEVENTY, TOY

# TOY: hidden 4, 2 layers of 29 (a matrix 4 x 5 with bias, a norm of 4), keys 3, 10 words, trunk 102, head 40.
ONE = EngineLayout("process", "transformers")
VLLM = EngineLayout("process", "vllm")
LOAD = SamplingLoad("policy", TOY, sequences=40, prompts=10, prompt_tokens=6, response_tokens=2, call=40)
LARGE = architecture_of(MISTRAL)


def runtime(name: str = "transformers", **blocks: Any) -> Runtime:
    engine = {"name": name, **blocks.pop("engine", {})}
    return Runtime.model_validate({"device": "cuda", "engine": engine, **blocks})


def inference(load: SamplingLoad = LOAD, *readings: ScoringLoad, precision: Any = "float32") -> Inference:
    return Inference(precision, (load,), readings, "prompts", load.prompts, True)


def test_bytes_of_an_engine_by_hand() -> None:
    way = sampling_memory(LOAD, runtime(), "bfloat16", 5, "transformers", gpu=True)
    assert way["engine"] == 2 * 142
    assert way["kv_cache"] == 2 * 2 * 3 * 2 * 5 * 8  # keys and values, 2 bytes, 3 features, 2 layers, 5 x 8 tokens
    # 5 prompts of 6 tokens in one pass: 2 x 4 features that flow, 4 x 4 + 2 x 3 in attention; a mask of 3 bytes a pair
    assert way["activations"] == 30 * 2 * (8 + 22) + 3 * 5 * 6 * 6
    assert way["logits"] == 5 * 10 * (2 + 12)
    cut = sampling_memory(replace(LOAD, uses_top_p=True), runtime(), "bfloat16", 5, "transformers", gpu=True)
    assert cut["logits"] == 5 * 10 * (2 + 28)


def test_vllm_reads_so_many_tokens_at_a_time_and_sets_its_cache_aside_on_a_processor() -> None:
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


def test_bytes_of_what_is_read_by_hand() -> None:
    reward = scoring_memory(reward_scoring("reward", TOY, 3, 8), "bfloat16")
    assert reward == {
        "reward": 4 * (102 + 4), "copies": 2 * 25,
        "activations": 32 * 8 * (4 * 8 + 2 * 22), "logits": 0,
    }  # fmt: skip
    load = ScoringLoad("sft", TOY, 8, 16, 3, logit_tokens=2, is_rounded=True)
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


def test_operations_of_a_load_by_hand() -> None:
    sequence, prompt = forward_flops(TOY, 8, 8, 2), forward_flops(TOY, 6, 6)
    assert LOAD.flops(1.0, shares_prompts=False) == 40 * sequence
    assert LOAD.flops(1.0, shares_prompts=True) == 10 * prompt + 40 * (sequence - prompt)


def test_seconds_of_one_engine_by_hand() -> None:
    hardware = parse_hardware("h100")
    device = hardware.device
    settings = runtime(engine={"batch_size": 8})
    way = sampling_way(inference(), settings, hardware, ONE, 1.0)
    assert way.batch == 8 and way.time is not None
    # 8 sequences that hold 6 + 2 / 2 tokens
    step = (4 * 142 + 2 * 4 * 3 * 2 * 8 * 7) / (ASSUMED[True].memory * device.bandwidth)
    reading = 40 * forward_flops(TOY, 6, 6) / (ASSUMED[True].products * device.flops_float32)
    assert way.time.sampling == pytest.approx(reading + 2 * 5 * step)  # five times eight sequences of two tokens
    assert (way.time.sampled, way.time.read, way.time.scoring) == (80, 240, 0)
    scoring = sampling_way(inference(LOAD, reward_scoring("reward", TOY, 40, 8)), settings, hardware, ONE, 1.0).time
    assert scoring is not None
    assert scoring.scoring == pytest.approx(
        40 * forward_flops(TOY, 8, 8) / (ASSUMED[True].products * device.flops_float32)
    )
    assert scoring.seconds == pytest.approx(way.time.sampling + scoring.scoring)
    assert scoring.read == 240 + 320


def test_servers_share_the_sequences_and_vllm_reads_a_prompt_once() -> None:
    hardware = parse_hardware("4xh100")
    one_server, four = (
        sampling_way(inference(), runtime("vllm"), hardware, EngineLayout("servers", "vllm", count), 1.0)
        for count in (1, 4)
    )
    assert (one_server.batch, four.batch) == (40, 10)
    assert one_server.time is not None and four.time is not None
    assert one_server.time.read == four.time.read == 60
    assert four.time.sampling < one_server.time.sampling
    few = replace(LOAD, call=4)  # what is handed over at a time is all that servers can share
    assert sampling_way(inference(few), runtime("vllm"), hardware, EngineLayout("servers", "vllm", 4), 1.0).batch == 1


def test_tensor_parallel_by_hand() -> None:
    model = replace(TOY, heads=(4, 1), key_value_width=1)
    # norms (2 x 4 + 4) stand on both; the one head of keys too, and its matrices of 2 x 4 weights a layer
    weights, cache = tensor_parallel_bytes(model, 2 * 142, 100, 2, 2)
    assert cache == 100
    assert weights == (284 - 24) / 2 + 24 + 2 * 2 * 2 * 4 * 1 * (1 - 1 / 2)
    assert tensor_parallel_bytes(replace(model, heads=(4, 2)), 284, 100, 2, 2)[1] == 50
    hardware, layout = parse_hardware("2xh100"), EngineLayout("servers", "vllm", 1, 2)
    way = sampling_way(
        inference(replace(LOAD, model=replace(model, heads=(4, 2)))), runtime("vllm"), hardware, layout, 1.0
    )
    assert way.time is not None
    tokens = 2 * 40 + 60  # decoded, and of prompts
    ring = 2 * (1 / 2) * 4 * 4  # an all-reduce of 4 features of 4 bytes
    exchanged = 4 * (tokens * ring / (ASSUMED[True].links * hardware.device.link) + 2 * HOP)
    assert way.time.exchanging == pytest.approx(exchanged)


@pytest.mark.parametrize(
    ("heads", "devices", "reason"),
    [
        ((9, 3), 2, "9 heads (3 of keys) do not divide among 2"), ((8, 3), 2, "8 heads (3"), ((32, 8), 8, ""),
        ((32, 2), 8, ""), ((0, 0), 2, "is not known"), ((9, 3), 1, ""),
    ],
)  # fmt: skip
def test_what_devices_can_share(heads: tuple[int, int], devices: int, reason: str) -> None:
    way = tensor_parallel_obstacle(replace(TOY, heads=heads), devices)
    assert reason in way and bool(reason) == bool(way)


def test_ways_are_those_that_there_are() -> None:
    machine = parse_hardware("8xh100")
    way = [way.label for way in candidate_layouts(runtime("auto"), machine)]
    assert way[1:] == ["8 servers", "4 servers, tensor_parallel 2", "2 servers, tensor_parallel 4",
                         "1 server, tensor_parallel 8"]  # fmt: skip
    assert [way.placement for way in candidate_layouts(runtime("auto"), parse_hardware("h100"))] == ["process"]
    assert requested_layout(runtime("auto"), machine) is None
    requested = requested_layout(runtime("transformers"), machine)
    assert requested is not None and requested.label == "one engine (transformers)"
    running = requested_layout(runtime("auto", rollouts={"addresses": ["http://127.0.0.1:8000"]}), machine)
    assert running is not None and running.label == "servers that run already"
    ray = requested_layout(runtime("vllm", executor={"name": "ray", "samplers": {"count": 9}}), machine)
    assert ray is not None and (ray.label, ray.engines_per_device) == ("9 samplers of Ray (vllm)", 2)


@pytest.mark.parametrize(
    ("rollouts", "hardware", "together", "why"),
    [
        ({"servers": 7}, "8xh100", 1, ""),
        ({"servers": 8}, "8xh100", 1, ""),
        ({"servers": 3}, "2xh100", 2, ""),
        ({"servers": 1, "tensor_parallel": 4}, "2xh100", 2, "tensor_parallel 4 needs as many devices of one machine"),
        ({"servers": 1, "gpus": [9]}, "8xh100", 1, "names GPU 9, and a machine has 8 (0 to 7)"),
    ],
)
def test_servers_stand_where_the_settings_put_them(rollouts: Any, hardware: str, together: int, why: str) -> None:
    way = requested_layout(runtime("auto", rollouts=rollouts), parse_hardware(hardware))
    assert way is not None and way.engines_per_device == together
    assert why in way.obstacle and bool(why) == bool(way.obstacle)
    shown = sampling_ways(inference(), runtime("auto", rollouts=rollouts), parse_hardware(hardware), 1.0)
    assert len(shown) == 1 and shown[0].obstacle == way.obstacle


def large(sequences: int = 4000, prompt: int = 1000) -> Inference:
    return inference(
        SamplingLoad("policy", LARGE, sequences, sequences // 4, prompt, 24, sequences), precision="bfloat16"
    )


def test_the_largest_number_at_a_time_fills_the_share_of_the_card_and_one_more_does_not_fit() -> None:
    hardware = parse_hardware("h100")
    way = sampling_way(large(), runtime("vllm"), hardware, VLLM, 1.0)
    assert 0 < way.batch == way.largest < 128
    share = int(0.35 * hardware.device.memory)
    each = 2 * 2 * 1024 * 32 * 1024 + 32000 * 14  # a sequence's cache of 1,024 tokens, and its logits
    assert way.peak <= share < way.peak + each
    more = sampling_way(large(), runtime("vllm", engine={"gpu_memory": 0.9}), hardware, VLLM, 1.0)
    assert more.batch == 128 < more.largest


def test_an_engine_that_does_not_fit_into_its_share_says_so_and_remedies_hold() -> None:
    hardware = parse_hardware("a100-40")
    ways = sampling_ways(large(), runtime("vllm"), hardware, 1.0)
    assert "one sequence of 1024 tokens needs 14.4 GiB, the engine has 13.8 (runtime.engine.gpu_memory 0.35)" in (
        ways[0].obstacle
    )
    way = sampling_remedies(large(), runtime("vllm"), hardware, {"--set x": large(4000, 8)})
    assert way[:2] == ["--set runtime.engine.gpu_memory=0.9", "--hardware 2xa100-40"]
    assert way[2].startswith("--hardware ") and "--set x" not in way
    for words in way[1:]:
        assert not sampling_ways(large(), runtime("vllm"), parse_hardware(words.split()[1]), 1.0)[0].obstacle
    assert not sampling_ways(large(), runtime("vllm", engine={"gpu_memory": 0.9}), hardware, 1.0)[0].obstacle


def test_a_cache_too_small_for_one_sequence_is_refused_on_a_processor() -> None:
    hardware = parse_hardware("cpu-64")
    small = runtime("vllm", device="cpu", engine={"cpu_kv_cache_gb": 0.1})
    way = sampling_way(large(), small, hardware, VLLM, 1.0)
    assert way.obstacle == (
        "one sequence of 1024 tokens does not fit into a cache of 0.1 GiB (runtime.engine.cpu_kv_cache_gb)"
    )
    roomy = sampling_way(large(), runtime("vllm", device="cpu"), hardware, VLLM, 1.0)
    assert roomy.batch == 8 and not roomy.obstacle  # 1 GiB holds eight of 128 MiB


def test_a_reward_model_that_stands_on_one_device_is_refused_whatever_samples() -> None:
    hardware = parse_hardware("2xl4")
    wanted = replace(large(), scoring=(reward_scoring("reward", LARGE, 4000, 1024),))
    ways = sampling_ways(wanted, runtime("auto"), hardware, 1.0)
    reason = next(way.obstacle for way in ways if way.largest)
    assert reason.startswith("scoring by reward needs ") and reason.endswith("on one device, usable are 20.9")
    assert all(way.obstacle and way.time is None for way in ways)
    card = sampling_remedies(wanted, runtime("auto"), hardware, {})
    assert len(card) == 1 and card[0].startswith("--hardware 2x")


def test_the_fastest_way_that_fits_is_first_and_a_large_model_is_parted() -> None:
    load = SamplingLoad("policy", architecture_of(SEVENTY), 4000, 1000, 1000, 24, 512)
    ways = sampling_ways(inference(load, precision="bfloat16"), runtime("auto"), parse_hardware("8xh100"), 1.0)
    assert [way.label for way in ways if way.fits] == ["1 server, tensor_parallel 8"]
    small = sampling_ways(large(), runtime("auto"), parse_hardware("8xh100"), 1.0)
    times = [way.time.seconds for way in small if way.time is not None]
    assert times == sorted(times) and small[0].layout.engines > 1


def test_engines_that_share_a_card_share_its_memory_and_its_speed() -> None:
    hardware = Hardware(parse_hardware("h100").device, 1, 1)
    first, two = (
        sampling_ways(large(), runtime("auto", rollouts={"servers": count}), hardware, 1.0)[0] for count in (1, 2)
    )
    assert first.time is not None and two.time is not None
    assert two.time.sampling >= first.time.sampling
    assert two.parts["engine"] == 2 * first.parts["engine"]
    crowded = sampling_ways(large(), runtime("auto", rollouts={"servers": 3}), hardware, 1.0)[0]
    assert crowded.obstacle == ("3 engines share one device, and each takes 0.35 of it (runtime.engine.gpu_memory)")
    small = Hardware(parse_hardware("cpu-20").device, 1, 1)
    shared = sampling_ways(large(), runtime("vllm", device="cpu", rollouts={"servers": 2}), small, 1.0)[0]
    assert "each of 2 engines on a device has" in shared.obstacle


@pytest.mark.parametrize(
    ("rows", "both", "held_out"),
    [(Rows(100, 20, 7), 90 + 5, 4), (Rows(stand_in=1000), 90, 4), (Rows(0, 0, 1000), 0, 0), (Rows(3, 1), 4, 1)],
)
def test_rows_of_a_record_come_before_a_stand_in(rows: Rows, both: int, held_out: int) -> None:
    assert (rows.count_both(90, 5), rows.count_test(4)) == (both, held_out)


def test_what_is_not_known_takes_memory_and_no_time() -> None:
    unknown = inference(replace(LOAD, sequences=None, prompts=0))
    way = sampling_way(unknown, runtime(), parse_hardware("h100"), ONE, 1.0)
    assert way.time is None and way.batch == 40 and not way.obstacle
    both = replace(unknown, sampling=(LOAD, *unknown.sampling))
    known_time, both_times = (
        sampling_way(load, runtime(), parse_hardware("h100"), ONE, 1.0).time for load in (inference(), both)
    )
    assert known_time == both_times
    model: Architecture = TOY
    read = Inference("float32", (), (ScoringLoad("sft", model, 8, 16, None, 8),), "items", 0, True)
    only = sampling_ways(read, runtime(), parse_hardware("h100"), 1.0)
    assert [way.label for way in only] == ["one device"] and only[0].phase == "reading by sft"


def test_a_mapped_file_is_there_while_weights_are_rounded_and_refuses_nothing() -> None:
    wanted = inference(replace(LOAD, model=LARGE, call=1), precision="bfloat16")
    roomy, tight = (
        sampling_way(wanted, runtime(device="cpu"), parse_hardware(text), ONE, 1.0) for text in ("cpu-64", "cpu-20")
    )
    assert roomy.phase == tight.phase == "loading" and not roomy.obstacle and not tight.obstacle
    assert roomy.parts["file"] == 4 * LARGE.parameters and roomy.parts["engine"] == 2 * LARGE.parameters
    assert tight.peak == tight.parts["context"] + parse_hardware("cpu-20").device.usable
    plain = sampling_way(
        replace(wanted, precision="float32"), runtime(device="cpu"), parse_hardware("cpu-64"), ONE, 1.0
    )
    assert plain.phase == "sampling"
