"""Markdown tables of configuration blocks: a row for each field, as ``align fields`` describes it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel

from align.config.field_descriptions import BlockNaming, describe_fields

Link = Callable[[type[BaseModel]], str]
"""Returns the address of a block's section, seen from the page that is being written."""

MOST_LINKS = 3
"""Alternatives that a type lists one by one when they are on another page."""


def name_with(link: Link) -> BlockNaming:
    """Return a naming of blocks by links to their sections."""

    def name_blocks(models: Sequence[type[BaseModel]]) -> str:
        pages = {link(model).partition("#")[0] for model in models}
        if len(models) > MOST_LINKS and pages != {""} and len(pages) == 1:
            return f"a block of [this page]({pages.pop()})"
        return " or ".join(f"[{model.__name__}]({link(model)})" for model in models)

    return name_blocks


def field_table(model: type[BaseModel], link: Link) -> str:
    """Return the table of a block's fields, required ones first."""
    rows = ["| field | type | default | bounds | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in describe_fields(model, name_with(link)):
        cells = (
            f"`{field.name}`",
            field.type,
            f"**{field.default}**" if field.is_required else field.default,
            field.bounds,
            field.meaning.replace("\n", "<br>"),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def block_section(model: type[BaseModel], title: str, link: Link) -> str:
    """Return a block's section: heading, docstring and table."""
    docstring = model.__doc__ or ""
    introduction = "\n".join(line.strip() for line in docstring.strip().splitlines())
    heading = f"## {title} {{#{anchor(model)}}}"
    return "\n\n".join(part for part in (heading, introduction, field_table(model, link)) if part) + "\n"


def anchor(model: type[BaseModel]) -> str:
    """Return the id of a block's section on its page."""
    return model.__name__.lower()
