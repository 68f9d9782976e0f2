"""Docstrings of fields come from the class that declares them, when somebody asks."""

from __future__ import annotations

from pydantic import Field

from align.config.base import Config
from align.config.field_descriptions import field_docstrings


class Parent(Config):
    first: int = 1
    """Number of
    things."""
    second: int = 2
    """Parent's second."""
    third: int = 3
    fourth: int = Field(4, description="In the field.")
    """Not this."""


class Child(Parent):
    second: int = 20
    """Child's second."""
    fifth: int = 5
    """Fifth."""


def test_inherited_and_redeclared_fields_have_their_own_text() -> None:
    class Local(Child):
        fifth: int = 50
        """Inside a function."""

    assert field_docstrings(Parent) == {
        "first": "Number of\nthings.",
        "second": "Parent's second.",
        "fourth": "In the field.",
    }
    assert field_docstrings(Child)["second"] == "Child's second."
    assert field_docstrings(Child)["first"] == "Number of\nthings."
    assert field_docstrings(Local)["fifth"] == "Inside a function."


def test_a_field_that_is_declared_again_without_text_has_none() -> None:
    class Silent(Parent):
        first: int = 10

    assert "first" not in field_docstrings(Silent)


def test_the_json_schema_shows_them() -> None:
    properties = Child.model_json_schema()["properties"]
    assert properties["fifth"]["description"] == "Fifth."
    assert properties["fourth"]["description"] == "In the field."
    assert "description" not in properties["third"]


def test_a_class_without_source_has_none() -> None:
    namespace: dict[str, object] = {"Config": Config, "__name__": "nowhere"}
    exec("class Made(Config):\n    first: int = 1\n    'Text.'\n", namespace)
    assert field_docstrings(namespace["Made"]) == {}  # type: ignore[arg-type]
