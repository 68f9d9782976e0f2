"""A function's identity follows the code behind it: helpers, packages, relative imports; never what is not its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.user_functions import function_identity
from align.store import fingerprint as module
from align.store.fingerprint import canonical, code_identity, digest, file_digest
from tests.support.refusals import Refused

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
def test_what_has_no_stable_identity_raises_and_is_named(refused: Refused, value: object) -> None:
    refused(canonical, {"outer": value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_raises(refused: Refused, value: float) -> None:
    refused(canonical, [value])


def test_file_digest(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


FILES = {
    "rules_of_this_test/__init__.py": "",
    "rules_of_this_test/score.py": (
        "import json\nimport numpy as np\nfrom align.data.rows import Row\nfrom . import words\n"
        "from .deep.inner import limit\nfrom rules_of_this_test.weights import HALF\nimport helper_of_this_test\n"
        "def score(rows, responses):\n    from rules_of_this_test import late\n    return [0.0 for _ in responses]\n"
    ),
    "rules_of_this_test/words.py": "WORDS = ['a']\n",
    "rules_of_this_test/late.py": "LATE = 1\n",
    "rules_of_this_test/weights.py": "HALF = 0.5\n",
    "rules_of_this_test/deep/__init__.py": "from ..table import TABLE\n",
    "rules_of_this_test/deep/inner.py": "from .. import nothing\nlimit = 3\n",
    "rules_of_this_test/table.py": "TABLE = {}\n",
    "rules_of_this_test/unrelated.py": "raise RuntimeError('nobody imports this')\n",
    "helper_of_this_test.py": "from second_helper_of_this_test import *\n",
    "second_helper_of_this_test.py": "try:\n    import no_such_module_anywhere\nexcept ImportError:\n    pass\n",
    "stranger_of_this_test.py": "",
}
PATH = "rules_of_this_test.score:score"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in [name for name in sys.modules if "_of_this_test" in name]:
        del sys.modules[name]


IMPORTED = [name for name in FILES if "unrelated" not in name and "stranger" not in name]


@pytest.mark.parametrize("name", IMPORTED)
def test_a_change_in_any_module_behind_it_is_another_function(folder: Path, name: str) -> None:
    before = function_identity(PATH)
    assert function_identity(PATH) == before
    (folder / name).write_text((folder / name).read_text() + "# another meaning\n")
    assert function_identity(PATH) != before


def test_what_it_does_not_import_and_where_it_lies_play_no_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = function_identity(PATH)
    for name in FILES.keys() - set(IMPORTED):
        (folder / name).write_text("changed = True\n")
    assert function_identity(PATH) == before
    run = {name for name in sys.modules if "_of_this_test" in name}
    assert run <= {"rules_of_this_test"}, "only the package above the module is imported"
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in FILES:
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(elsewhere / name)
    for name in [name for name in sys.modules if "_of_this_test" in name]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(elsewhere))
    assert function_identity(PATH) == before


def test_a_module_that_appears_or_goes_is_noticed(folder: Path) -> None:
    before = code_identity("rules_of_this_test.score")
    (folder / "rules_of_this_test" / "nothing.py").write_text("")  # was an attribute that is not there
    assert code_identity("rules_of_this_test.score") != before


def test_installed_packages_enter_by_their_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = function_identity(PATH)

    def another(of: str) -> Callable[[str], str]:
        return lambda top: "another" if top == of else "same"

    monkeypatch.setattr(module, "_version", another("numpy"))
    with_another = function_identity(PATH)
    assert with_another != before
    monkeypatch.setattr(module, "_version", another("scipy"))
    assert function_identity(PATH) not in (before, with_another)
    monkeypatch.setattr(module, "_version", another("json"))  # the standard library has none
    assert function_identity(PATH) == function_identity(PATH)
    monkeypatch.undo()
    assert module._version("numpy") and module._version("yaml").startswith("PyYAML ")


def test_modules_that_import_each_other_are_read_once(folder: Path) -> None:
    (folder / "rules_of_this_test" / "words.py").write_text("from .score import score\n")
    assert function_identity(PATH)


def test_source_that_is_no_python_is_named(refused: Refused, folder: Path) -> None:
    (folder / "rules_of_this_test" / "words.py").write_text("x = 1\ndef :\n")
    refused(function_identity, PATH)
