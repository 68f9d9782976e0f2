"""What a user may write for hardware, and what is made of it."""

from __future__ import annotations

import pytest

from align.capacity.hardware import DEVICES, GIB, parse_hardware
from align.errors import UserError


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [
        ("8xh100", 1, 8, "h100"),
        ("1xa100-40", 1, 1, "a100-40"),
        ("H200", 1, 1, "h200"),
        ("4x8xH100", 4, 8, "h100"),
        ("2x4090", 1, 2, "rtx4090"),
        ("a100", 1, 1, "a100-80"),
        ("cpu", 1, 1, "cpu"),
    ],
)
def test_hardware_is_read_as_it_is_written(text: str, nodes: int, per_node: int, name: str) -> None:
    hardware = parse_hardware(text)
    assert (hardware.nodes, hardware.per_node, hardware.device.name) == (nodes, per_node, name)
    assert hardware.devices == nodes * per_node


@pytest.mark.parametrize("text", ["8xh10", "0xh100", "h100x8", "2x2x2xh100", "", "8 h100", "cpu-0", "8xh100;ls"])
def test_anything_else_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(UserError, match=r"--hardware .*such as 8xh100, 1xa100-40, cpu"):
        parse_hardware(text)


def test_a_slip_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="Did you mean 'l40s'"):
        parse_hardware("8xl40")


def test_a_price_of_one_s_own_replaces_the_table_s() -> None:
    assert parse_hardware("8xh100").device.price == DEVICES["h100"].price
    assert parse_hardware("8xh100", 1.25).device.price == 1.25


def test_processes_of_one_processor_share_it() -> None:
    single, quarter = parse_hardware("cpu-64").device, parse_hardware("4xcpu-64").device
    assert single.memory == 64 * GIB and quarter.memory == 16 * GIB
    assert quarter.flops == pytest.approx(single.flops / 4)
    assert parse_hardware("4x1xcpu-64").device.memory == 64 * GIB  # four machines


def test_every_card_has_a_size_a_speed_and_a_price() -> None:
    for device in DEVICES.values():
        assert 10 * GIB < device.usable < device.memory < 200 * GIB
        assert device.flops > device.flops_float32 > 1e13
        assert device.price is not None and 0 < device.price < 20
