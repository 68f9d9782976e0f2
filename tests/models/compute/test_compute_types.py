"""What ``precision: auto`` stands for: the measured speeds, where they are kept, and what an estimate expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.config.stages.sft import SftConfig
from align.models.compute import compute_types
from align.models.compute import precision as product_speed
from align.models.compute.compute_types import ProductSpeed, read_speed, speed_key, with_expected_precision, write_speed

EMULATED, NATIVE = ProductSpeed(bfloat16=14.0, float32=134.0), ProductSpeed(bfloat16=430.0, float32=185.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    for name in compute_types.ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_faster_type_is_the_measured_one() -> None:
    assert EMULATED.faster == "float32" and EMULATED.emulates_bfloat16
    assert NATIVE.faster == "bfloat16" and not NATIVE.emulates_bfloat16
    # Equal speeds: bfloat16 needs half the memory.
    assert ProductSpeed(100.0, 100.0).faster == "bfloat16"
    # AVX-512 without bfloat16 instructions is a little slower in bfloat16, which is no emulation.
    assert ProductSpeed(80.0, 100.0).faster == "float32" and not ProductSpeed(80.0, 100.0).emulates_bfloat16


def test_speed_is_kept_per_processor_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_speed() is None
    write_speed(NATIVE)
    assert read_speed() == NATIVE
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert read_speed() is None
    write_speed(EMULATED)
    assert read_speed() == EMULATED
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert read_speed() == NATIVE
    assert read_speed("NVIDIA H100") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", '{"KEY": {"bfloat16": 0, "float32": 1}}', '{"KEY": 3}'])
def test_damaged_cache_is_measured_again(content: str, cache: Path) -> None:
    cache.mkdir()
    (cache / "product_speed.json").write_text(content.replace("KEY", speed_key()))
    assert read_speed() is None
    write_speed(NATIVE)
    assert read_speed() == NATIVE


def test_cache_folder_that_is_a_file_is_no_error(cache: Path) -> None:
    cache.write_text("")
    write_speed(NATIVE)
    assert read_speed() is None


def test_speed_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.device] = []

    def measure(device: torch.device) -> ProductSpeed:
        measured.append(device)
        return EMULATED

    monkeypatch.setattr(product_speed, "measure", measure)
    assert [product_speed.resolve_precision("auto", CPU) for _ in range(2)] == ["float32", "float32"]
    assert measured == [CPU]
    assert product_speed.resolve_precision("bfloat16", CPU) == "bfloat16"


def test_measurement_takes_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # Warm-up, then products of 10 ms and 5 ms until 20 ms are spent: 10 + 5 + 5.
    seconds = iter([1.0, 0.010, 0.005, 0.005])
    monkeypatch.setattr(product_speed, "_seconds", lambda left, weight: next(seconds))
    rows, inputs, outputs = product_speed.CPU_SHAPE
    operations = 2 * rows * inputs * outputs
    assert product_speed._speed_in(torch.float32, CPU) == pytest.approx(operations / 0.005 / 1e9)


def test_both_types_are_really_measured() -> None:
    speed = product_speed.measure(CPU)
    assert speed.bfloat16 > 0.01 and speed.float32 > 0.01


@pytest.mark.parametrize(("speed", "expected"), [(EMULATED, "float32"), (NATIVE, "bfloat16")])
def test_estimate_expects_the_measured_type(speed: ProductSpeed, expected: str) -> None:
    write_speed(speed)
    config = SftConfig(model="m", data="d", learning_rate=1e-3)
    assert with_expected_precision(config, gpu=False).precision == expected
    assert with_expected_precision(config, gpu=True).precision == "bfloat16"
    explicit = config.model_copy(update={"precision": "float32"})
    assert with_expected_precision(explicit, gpu=True).precision == "float32"


@pytest.mark.parametrize(("flags", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_estimate_without_measurement_reads_flags(flags: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_types, "has_bf16_flags", lambda: flags)
    assert compute_types.expected_precision(gpu=False) == expected
