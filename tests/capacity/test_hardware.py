"""The notation of hardware, and the devices that it names."""

from __future__ import annotations

import pytest

from align.capacity.hardware import DEVICES, GIB, largest_that_fits, parse_hardware
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
def test_notation_is_parsed(text: str, nodes: int, per_node: int, name: str) -> None:
    hardware = parse_hardware(text)
    assert (hardware.nodes, hardware.per_node, hardware.device.name) == (nodes, per_node, name)
    assert hardware.devices == nodes * per_node


@pytest.mark.parametrize("text", ["8xh10", "0xh100", "h100x8", "2x2x2xh100", "", "8 h100", "cpu-0", "8xh100;ls"])
def test_other_notation_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UserError, match=r"--hardware .*such as 8xh100, 1xa100-40, cpu"):
        parse_hardware(text)


def test_misspelled_card_gets_nearest_name() -> None:
    with pytest.raises(UserError, match="Did you mean 'l40s'"):
        parse_hardware("8xl40")


def test_processes_share_a_processor_s_memory() -> None:
    single, quarter = parse_hardware("cpu-64").device, parse_hardware("4xcpu-64").device
    assert single.memory == 64 * GIB and quarter.memory == quarter.host == 16 * GIB
    assert parse_hardware("4x1xcpu-64").device.memory == 64 * GIB  # four machines


def test_cards_have_a_plausible_memory() -> None:
    for device in DEVICES.values():
        assert 10 * GIB < device.usable < device.memory < 200 * GIB


def test_other_cards_are_sorted_by_memory() -> None:
    others = parse_hardware("2xh100").other_cards()
    sizes = [cards.device.memory for cards in others]
    assert sizes == sorted(sizes) and len(others) == len(DEVICES) - 1
    assert all(cards.per_node == 2 and cards.device.name != "h100" for cards in others)


@pytest.mark.parametrize(("limit", "maximum", "expected"), [(0, 8, 0), (1, 8, 1), (5, 8, 5), (9, 8, 8), (100, 64, 64)])
def test_largest_that_fits_is_found(limit: int, maximum: int, expected: int) -> None:
    assert largest_that_fits(lambda number: number <= limit, maximum) == expected
