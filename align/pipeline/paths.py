"""Relative paths in a pipeline: each starts at the file that names it. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.base import Config
from align.config.located_paths import settle, unmark
from align.config.stages.continue_from import CONTINUE
from align.errors import UserError
from align.pipeline.loops import is_loop
from align.pipeline.registry import find_stage

Blocks = Mapping[str, Any]


def settle_pipeline(raw: Mapping[str, Any], base: Path, where: str) -> dict[str, Any]:
    """Return a pipeline's plain values with its stages' paths relative to ``base``.

    Blocks that are refused later are left as they are. Raises ``UserError`` as ``settle`` does.
    """
    settled = unmark(raw)
    if isinstance(raw.get("stages"), Mapping):
        settled["stages"] = _settle_stages(raw["stages"], base, f"{where}: stages")
    return dict(settled)


def _settle_stages(blocks: Blocks, base: Path, place: str) -> dict[str, Any]:
    settled: dict[str, Any] = {}
    for name, block in blocks.items():
        here = f"{place}.{name}"
        if not isinstance(block, Mapping):
            settled[name] = unmark(block)
        elif is_loop(str(name), block):
            settled[name] = _settle_loop(block, base, here)
        else:
            settled[name] = _settle_stage(block, _config_class(str(name), blocks), base, here)
    return settled


def _settle_loop(loop: Blocks, base: Path, place: str) -> dict[str, Any]:
    settled: dict[str, Any] = unmark(loop)
    stages = loop.get("stages")
    if not isinstance(stages, Mapping):
        return settled
    settled["stages"] = _settle_stages(stages, base, f"{place}.stages")
    changes = loop.get("changes")
    for number, blocks in changes.items() if isinstance(changes, Mapping) else ():
        for name, block in blocks.items() if isinstance(blocks, Mapping) else ():
            where = f"{place}.changes.{number}.{name}"
            settled["changes"][number][name] = _settle_stage(block, _config_class(str(name), stages), base, where)
    return settled


def _settle_stage(block: Any, config_class: type[Config] | None, base: Path, place: str) -> Any:
    return unmark(block) if config_class is None else settle(config_class, block, base, place)


def _config_class(name: str, blocks: Blocks) -> type[Config] | None:
    """Return the config class of a stage; None for a kind that there is not, which is refused later."""
    visited: set[str] = set()
    kind = name
    while name in blocks and isinstance(blocks[name], Mapping) and name not in visited:
        visited.add(name)
        kind = str(blocks[name].get("stage", name))
        # A stage that continues another one has its kind.
        source = blocks[name].get(CONTINUE)
        if "stage" in blocks[name] or not isinstance(source, str):
            break
        name = str(source)
    try:
        return find_stage(kind).config_class()
    except (KeyError, UserError):
        return None
