import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.store.fingerprint import canonical, digest, file_digest

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_canonical_text_is_sorted_and_bare() -> None:
    assert canonical({"b": [1, 2.5, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5,null]}'


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_order_of_keys_changes_nothing(value: dict[str, object]) -> None:
    assert digest(value) == digest(dict(reversed(list(value.items()))))


def test_a_tuple_is_a_list_and_a_number_is_not_its_text() -> None:
    assert digest((1, 2)) == digest([1, 2])
    assert digest(1) != digest("1")


@pytest.mark.parametrize("value", [Path("x"), object(), {1, 2}, {1: 2}, len, b"x"])
def test_what_has_no_stable_identity_raises_and_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=r"\$\.outer"):
        canonical({"outer": value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_raises(value: float) -> None:
    with pytest.raises(ValueError, match="no canonical form"):
        canonical([value])


def test_file_digest(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
