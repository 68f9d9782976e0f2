"""The reference of everything a YAML can say: a page for each kind of stage, and pages for the blocks they share.

A block that one page uses stands on that page; a block that several use stands on ``shared.md``. Torch-free.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from field_tables import anchor, block_section
from pydantic import BaseModel

from align.cli.fields import topic_blocks
from align.config.field_descriptions import discriminator, reachable_models
from align.pipeline.registry import STAGES
from align.registry import Stage, Topic, registered

SHARED = "reference/shared.md"


@dataclass(frozen=True)
class ReferencePage:
    """One page of the reference: the blocks it is about, ``roots``, and its opening lines."""

    path: str
    title: str
    introduction: str
    roots: tuple[type[BaseModel], ...]


def reference_pages() -> dict[str, str]:
    """Return every page of the reference: path below ``docs/`` → Markdown."""
    pages = [*_topic_pages(), *(_stage_page(stage) for stage in STAGES.values())]
    homes = _assign_homes(pages)
    texts = {page.path: _render(page, homes) for page in pages}
    shared = [model for model, path in homes.items() if path == SHARED]
    introduction = "Blocks that several stages have in common."
    texts[SHARED] = _render(ReferencePage(SHARED, "Shared blocks", introduction, tuple(shared)), homes)
    return {"reference/index.md": _index(), **texts}


def _topic_pages() -> list[ReferencePage]:
    return [
        ReferencePage(f"reference/{name}.md", topic.title, topic.purpose, topic_blocks(topic))
        for name, topic in registered(Topic).items()
    ]


def _stage_page(stage: Stage) -> ReferencePage:
    makes = stage.makes.value if stage.makes else "decided by its config"
    introduction = f"{_sentence(stage.purpose)}\n\nMakes: {makes}. Version: {stage.version}."
    if stage.trainer_class is not None:
        introduction += f" Options under `trainer:` are those of `{stage.trainer_class.replace(':', '.')}`."
    return ReferencePage(_stage_path(stage.kind), f"`{stage.kind}`", introduction, (stage.config_class(),))


def _stage_path(kind: str) -> str:
    return f"reference/stages/{kind}.md"


def _assign_homes(pages: list[ReferencePage]) -> dict[type[BaseModel], str]:
    """Return the page of every block.

    A page has its roots. What a topic's blocks contain is on the topic's page, first topic first; what stages' blocks
    contain is on the stage's page, or on the shared one where several stages contain it.
    """
    homes = {root: page.path for page in pages for root in page.roots}
    topics = [page for page in pages if "/stages/" not in page.path]
    for page in topics:
        for model in _blocks(page, homes):
            homes.setdefault(model, page.path)
    stages_of: dict[type[BaseModel], list[str]] = {}
    for page in pages:
        for model in _blocks(page, homes):
            stages_of.setdefault(model, []).append(page.path)
    for model, paths in stages_of.items():
        homes.setdefault(model, paths[0] if len(paths) == 1 else SHARED)
    return homes


def _blocks(page: ReferencePage, homes: dict[type[BaseModel], str]) -> list[type[BaseModel]]:
    """Return the page's roots and the blocks below them, without those that another page has, nor what is below."""
    elsewhere = {model for model, path in homes.items() if path != page.path}
    blocks = [model for root in page.roots for model in reachable_models(root, elsewhere)]
    return list(dict.fromkeys(blocks))


def _render(page: ReferencePage, homes: dict[type[BaseModel], str]) -> str:
    def link(model: type[BaseModel]) -> str:
        if homes[model] == page.path:
            return f"#{anchor(model)}"
        return f"{posixpath.relpath(homes[model], posixpath.dirname(page.path))}#{anchor(model)}"

    is_stage = "/stages/" in page.path
    sections = []
    for model in _blocks(page, homes):
        title = "Fields" if is_stage and model in page.roots else discriminator(model) or model.__name__
        sections.append(block_section(model, title, link))
    return "\n\n".join([f"# {page.title}", page.introduction, *sections])


def _index() -> str:
    lines = [
        "# Configuration reference",
        "Every stage and every field, generated from the classes that check the YAML. `align fields` prints the same "
        "in a terminal, `align schema` as a JSON schema for editors.",
        "| stage | makes | purpose |\n| --- | --- | --- |",
    ]
    for stage in STAGES.values():
        makes = stage.makes.value if stage.makes else "as configured"
        lines[-1] += f"\n| [`{stage.kind}`](stages/{stage.kind}.md) | {makes} | {_sentence(stage.purpose)} |"
    others = [f"- [{topic.title}]({name}.md): {topic.purpose}" for name, topic in registered(Topic).items()]
    others.append("- [Shared blocks](shared.md): blocks that several stages have in common.")
    return "\n\n".join([*lines, "## Blocks that are not a stage's alone", "\n".join(others)])


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")
