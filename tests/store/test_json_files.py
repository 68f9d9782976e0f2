"""Sealed objects and cache entries: what was changed is noticed, whatever the change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.store.json_files import parse_sealed, read_entry, read_or_compute, seal, write_entry
from tests.support.refusals import Refused

KEY = "a" * 64


def test_sealed_object_opens_in_any_order_of_fields() -> None:
    payload = {"b": [1, 2.5, math.inf, None], "a": {"ä": "\ud800", "1": True}, "t": (1, 2)}
    text = json.dumps(dict(reversed(seal(payload).items())), indent=1)
    assert parse_sealed(text.encode()) == {**payload, "t": [1, 2]}


@pytest.mark.parametrize(
    "sealed",
    [
        [],
        None,
        {},
        {"a": 1},
        {**seal({"a": 1}), "a": 2},
        {**seal({"a": 1}), "b": 2},
        {**seal({"a": 1}), "seal": None},
    ],
)
def test_changed_object_does_not_open(refused: Refused, sealed: Any) -> None:
    refused(lambda: parse_sealed(json.dumps(sealed).encode()))


def test_seal_refuses_paths_and_a_second_seal(refused: Refused) -> None:
    with pytest.raises(TypeError):
        seal({"a": Path()})
    refused(lambda: seal(seal({"a": 1})))


def test_entry_is_read_only_under_its_key(tmp_path: Path) -> None:
    path, warnings = tmp_path / "deep" / "entry.jsonl", []  # type: ignore[var-annotated]
    assert read_entry(path, KEY, warnings.append) is None
    write_entry(path, KEY, [{"a": math.nan}, [1], "text"])
    values = read_entry(path, KEY, warnings.append)
    assert values is not None and math.isnan(values[0]["a"]) and values[1:] == [[1], "text"]
    assert warnings == []
    assert read_entry(path, "b" * 64, warnings.append) is None
    assert warnings == [
        f"{path} is not what was written there (it was written under another key); its result is computed again"
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["entry.jsonl"]  # no draft is left


DAMAGES = {
    "empty": lambda text: b"",
    "a list": lambda text: b"[]",
    "an object": lambda text: b"{}",
    "null": lambda text: b"null\n",
    "half": lambda text: text[: len(text) // 2],
    "without its seal": lambda text: text[: text.index(b"\n") + 1],
    "without its content": lambda text: text[text.index(b"\n") + 1 :],
    "another number": lambda text: text.replace(b"0.25", b"6.78"),
    "one bit": lambda text: bytes([text[0] ^ 1]) + text[1:],
    "no text": lambda text: b"\xff" + text,
    "a deep list": lambda text: b"[" * 200_000,
    "a line more": lambda text: text.replace(b"\n", b"\n1\n", 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_computed_again_with_warning(tmp_path: Path, damage: Any) -> None:
    path, warnings = tmp_path / "entry.jsonl", []  # type: ignore[var-annotated]
    assert read_or_compute(path, KEY, lambda: {"kl": (0.25,)}, warnings.append) == {"kl": [0.25]}
    assert read_or_compute(path, KEY, lambda: pytest.fail("it is there"), warnings.append) == {"kl": [0.25]}
    path.write_bytes(damage(path.read_bytes()))
    assert read_or_compute(path, KEY, lambda: {"kl": [0.25]}, warnings.append) == {"kl": [0.25]}
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert read_or_compute(path, KEY, lambda: pytest.fail("it is mended"), warnings.append) == {"kl": [0.25]}


def test_seal_covers_every_bit_of_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "entry.jsonl"
    write_entry(path, KEY, [[0.25, "a"]])
    content = path.read_bytes()
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        assert read_entry(path, KEY, lambda text: None) in (None, [[0.25, "a"]]), place
