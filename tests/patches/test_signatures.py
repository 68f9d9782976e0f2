"""Private names are checked before a patch uses them."""

import pytest

from align.errors import UserError
from align.patches.signatures import private_name


def test_private_name_is_returned() -> None:
    name = private_name("pytest", "pytest:fixture", ["fixture_function", "scope", "params", "autouse", "ids", "name"])
    assert name is pytest.fixture


def test_missing_name_is_refused_with_version() -> None:
    with pytest.raises(UserError, match=rf"^pytest {pytest.__version__} has no pytest:Gone\.part\. Install"):
        private_name("pytest", "pytest:Gone.part")


def test_changed_signature_is_refused() -> None:
    with pytest.raises(UserError, match=r"pytest:param has the parameters \(values, marks, id\), and .* expects \(a\)"):
        private_name("pytest", "pytest:param", ["a"])
