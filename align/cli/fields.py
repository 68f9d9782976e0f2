"""``align fields``: the fields of a stage or another block, as the classes that check the YAML describe them.

The reference of the documentation is written from the same descriptions. Never imports torch.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from align.cli.parser import print_json
from align.config.field_descriptions import (
    FieldDescription,
    describe_fields,
    discriminator,
    join_lines,
    nested_models,
    reachable_models,
)
from align.config.validation import remedy_for_unknown, suggest
from align.errors import UserError, printable, shorten
from align.registry import Topic, load, registered

WIDEST = 100
"""Columns that are used at most."""
INDENT = "    "


def topic_blocks(topic: Topic) -> tuple[type[BaseModel], ...]:
    """Import the classes of a topic's blocks."""
    return tuple(block for path in topic.blocks for block in nested_models(load(path)))


@dataclass(frozen=True)
class Subject:
    """Blocks whose fields are printed, with the word that names them."""

    name: str
    purpose: str
    blocks: Sequence[type[BaseModel]]
    is_stage: bool = False


def run(options: argparse.Namespace) -> int:
    """Run ``align fields``."""
    if options.kind is None:
        _list_subjects(options.json)
        return 0
    subject = find_subject(options.kind)
    blocks = [] if options.name is None else find_blocks(subject, options.name)
    if options.name is None:
        _show_blocks(subject, options.json)
    elif blocks:
        _show_blocks(Subject(f"{subject.name} {options.name}", "", blocks), options.json)
    else:
        _show_field(subject, options.name, options.json)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``align fields``."""
    parser.add_argument(
        "kind", metavar="KIND", nargs="?", help="a stage's kind, or a block like runtime; none lists them"
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a field, like kl_coef, or tuning.rank in a block; or the value that selects a block, like lora",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _list_subjects(as_json: bool) -> None:
    from align.pipeline.registry import STAGES

    purposes = {kind: stage.purpose for kind, stage in STAGES.items()}
    others = {name: topic.purpose for name, topic in registered(Topic).items()}
    if as_json:
        print_json({"stages": purposes, "blocks": others})
        return
    for title, entries in (("Stages", purposes), ("Other blocks", others)):
        print(f"{title}:")
        for name, purpose in entries.items():
            _print_wrapped(purpose, f"  {name:<12}", " " * 14)
    print()
    _print_wrapped("`align fields KIND` prints the fields of one, `align fields KIND NAME` a single field.")


def find_subject(kind: str) -> Subject:
    """Return the stage or topic that a word names; ``UserError`` with the nearest name for another word."""
    from align.pipeline.registry import STAGES, find_stage

    other_topics = registered(Topic)
    if kind in other_topics:
        return Subject(kind, other_topics[kind].purpose, topic_blocks(other_topics[kind]))
    if kind not in STAGES and ":" not in kind:
        raise UserError(f"align fields: there is no kind '{shorten(kind)}'.{suggest(kind, [*STAGES, *other_topics])}")
    stage = find_stage(kind)
    makes = stage.makes.value if stage.makes else "what its config decides"
    purpose = f"{stage.purpose}. Makes {makes}."
    if stage.trainer_class is not None:
        purpose += f" Options under trainer are those of {stage.trainer_class.replace(':', '.')}."
    return Subject(kind, purpose, [stage.config_class()], is_stage=True)


def find_blocks(subject: Subject, path: str) -> list[type[BaseModel]]:
    """Return the blocks that the last word of a path selects, such as the step ``cap`` or the task ``gsm8k``.

    None for a word that is also a field of the subject.
    """
    word = path.rpartition(".")[2]
    reachable = dict.fromkeys(block for root in subject.blocks for block in reachable_models(root))
    if any(word in block.model_fields for block in reachable):
        return []
    return [block for block in reachable if (discriminator(block) or "").partition(": ")[2] == word]


def _show_blocks(subject: Subject, as_json: bool) -> None:
    if as_json:
        print_json([_block_json(block) for block in subject.blocks])
        return
    _print_wrapped(f"{subject.name}: {subject.purpose}".removesuffix(": "))
    for block in subject.blocks:
        print()
        _print_block(block, len(subject.blocks) > 1 or not subject.purpose)
    print()
    if subject.is_stage:
        _print_wrapped("Every stage also takes `stage:`, its kind, and `seed:`, in place of the pipeline's.")
    inner = [name for block in subject.blocks for name, field in block.model_fields.items() if _has_blocks(field)]
    if inner:
        _print_wrapped(f"Fields inside a block: `align fields {subject.name} {inner[0]}`.")


def _has_blocks(field: Any) -> bool:
    return next(nested_models(field.annotation), None) is not None


def _show_field(subject: Subject, path: str, as_json: bool) -> None:
    """Print a field as each block describes it, and the blocks that its value may be."""
    owners = _find_owners(subject, path)
    name = path.rpartition(".")[2]
    inner = list(dict.fromkeys(block for owner in owners for block in _blocks_of(owner, name)))
    if as_json:
        fields = [{"block": _label(owner), **_field_json(_describe(owner, name))} for owner in owners]
        print_json({"fields": fields, "blocks": [_block_json(block) for block in inner]})
        return
    # Blocks of several methods often share a field, which then is printed once.
    labels: dict[FieldDescription, list[str]] = {}
    for owner in owners:
        labels.setdefault(_describe(owner, name), []).append(_label(owner))
    for field, blocks in labels.items():
        if len(owners) > 1:
            _print_wrapped(f"With {' or '.join(blocks)}:")
        _print_field(field)
    for block in inner:
        print()
        _print_block(block, has_title=True)


def _find_owners(subject: Subject, path: str) -> list[type[BaseModel]]:
    """Return the blocks that have the field at the end of a path; ``UserError`` with the nearest name if none has."""
    holders = list(subject.blocks)
    *above, last = path.split(".")
    is_mapping = False
    for part in above:
        owners = [block for block in holders if part in block.model_fields]
        # Keys of a mapping are names of the user's, such as task names; they lead to the same blocks.
        if not owners and is_mapping:
            is_mapping = False
            continue
        _refuse_unknown(subject, path, part, holders, owners)
        is_mapping = any("dict[" in str(block.model_fields[part].annotation) for block in owners)
        holders = list(dict.fromkeys(inner for block in owners for inner in _blocks_of(block, part)))
    owners = [block for block in holders if last in block.model_fields]
    _refuse_unknown(subject, path, last, holders, owners)
    return owners


def _refuse_unknown(
    subject: Subject, path: str, part: str, holders: Sequence[type[BaseModel]], owners: Sequence[type[BaseModel]]
) -> None:
    if owners:
        return
    place = f"align fields {subject.name} {shorten(path)}"
    if not holders:
        above = path.rpartition(f".{part}")[0]
        raise UserError(f"{place}: '{above}' has a value, and no fields below it.")
    raise UserError(f"{place}: there is no field '{shorten(part)}'. {remedy_for_unknown(part, holders)}".rstrip())


def _blocks_of(block: type[BaseModel], name: str) -> list[type[BaseModel]]:
    return list(nested_models(block.model_fields[name].annotation))


def _describe(block: type[BaseModel], name: str) -> FieldDescription:
    return next(field for field in describe_fields(block, _name_blocks) if field.name == name)


def _name_blocks(blocks: Sequence[type[BaseModel]]) -> str:
    """Return the words for a value that is a block: ``block with method: full, lora or qlora``."""
    selections = [discriminator(block) for block in blocks]
    keys = {selection.partition(":")[0] for selection in selections if selection is not None}
    if len(blocks) == 1 or len(keys) != 1 or None in selections:
        return "block"
    *values, last = [str(selection).partition(": ")[2] for selection in selections]
    return f"block with {keys.pop()}: {', '.join(values)} or {last}"


def _label(block: type[BaseModel]) -> str:
    return discriminator(block) or block.__name__


def _block_json(block: type[BaseModel]) -> dict[str, Any]:
    fields = [_field_json(field) for field in describe_fields(block, _name_blocks)]
    return {"block": _label(block), "meaning": _plain(join_lines(block.__doc__ or "")), "fields": fields}


def _field_json(field: FieldDescription) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, str) else value for name, value in asdict(field).items()}


def _print_block(block: type[BaseModel], has_title: bool) -> None:
    if has_title:
        print(_label(block))
    for paragraph in _lines(join_lines(block.__doc__ or "")):
        _print_wrapped(paragraph)
    print()
    for field in describe_fields(block, _name_blocks):
        # The title says `method: lora` already.
        if not has_title or not _label(block).startswith(f"{field.name}: "):
            _print_field(field)


def _print_field(field: FieldDescription) -> None:
    setting = "(required)" if field.is_required else f"= {field.default}"
    _print_wrapped(f"{field.name} {setting}", "", INDENT)
    _print_wrapped("; ".join(part for part in (field.type, field.bounds) if part), INDENT, INDENT)
    for paragraph in _lines(field.meaning):
        _print_wrapped(paragraph, INDENT, INDENT)


def _lines(text: str) -> Iterable[str]:
    return [line for line in text.split("\n") if line]


def _print_wrapped(text: str, first: str = "", following: str = "") -> None:
    columns = min(shutil.get_terminal_size().columns, WIDEST)
    lines = textwrap.wrap(
        _plain(text), columns, initial_indent=first, subsequent_indent=following, break_on_hyphens=False
    )
    print(printable("\n".join(lines)))


def _plain(markdown: str) -> str:
    """Return a text without the marks of code."""
    return markdown.replace("`", "")
