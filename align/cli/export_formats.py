"""``align export --format``: what each format needs before it is written, and its writing with its measurement."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from align.config.user_paths import user_path
from align.errors import UserError
from align.export.export import Source
from align.registry import Format, loaded

if TYPE_CHECKING:
    from align.export.answers import Job
    from align.export.export import Agreement, Written
    from align.export.fidelity import Fidelity


@dataclass(frozen=True)
class FormatOptions:
    """Options of a format, checked."""

    format: str
    type: str
    """Type of the weights, and the name of the format's limit."""
    name: str
    text: Path | None = None
    is_checked: bool = True
    task_items: int | None = None
    """Instructions that checkpoint and export answer for a task score; None to choose by the size of the model."""
    merged: Path | None = None
    """For ``lora``: the checkpoint with the adapter merged in."""
    base_name: str = ""
    """For ``lora``: the base in the adapter's config."""
    found: Any = None
    """Result of the format's own check, for its writer."""


class Writer(NamedTuple):
    """A format of an extension: its options, its check and its writing."""

    options: tuple[str, ...]
    """Names of the options that belong to the format."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Adds them; formats with the same function share them."""
    check: Callable[[argparse.Namespace, Source, Mapping[str, Any], FormatOptions], FormatOptions]
    """Completes the options with ``type`` and ``found``. Raises ``UserError`` for what the format cannot hold; the
    mapping has the ``lineage`` of the checkpoint."""
    write: Callable[
        [Source, Path, Path, Written, FormatOptions, Callable[[str], None]], tuple[Written, Fidelity | None]
    ]
    """Writes ``scratch/new`` of the source, the scratch folder, and a transformers folder with its description."""


def writers() -> dict[str, Writer]:
    """Return the formats of extensions."""
    return loaded(Format, lambda entry: entry.code)


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of formats."""
    formats = writers()
    choices = ("transformers", *formats, "lora")
    parser.add_argument("--format", choices=choices, default="transformers", help="what to write")
    for add in dict.fromkeys(writer.add_arguments for writer in formats.values()):
        add(parser)
    parser.add_argument("--text", metavar="FILE", help="text whose perplexity is measured, before and after")
    parser.add_argument(
        "--task-items",
        type=int,
        metavar="N",
        help="instructions that both answer for a task score (50; 0 below 20M parameters)",
    )


def check_format(
    options: argparse.Namespace, source: Source, card_facts: Mapping[str, Any], merged: Path | None
) -> FormatOptions | None:
    """Return the options of a format; None for a transformers folder.

    ``card_facts`` has the ``name`` and the ``lineage`` of the checkpoint. ``merged`` is the checkpoint of an adapter
    that is exported as it is. Raises ``UserError`` for options of another format, and for a checkpoint that the format
    cannot hold.
    """
    formats = writers()
    for word in dict.fromkeys(option for writer in formats.values() for option in writer.options):
        owners = [name for name, writer in formats.items() if word in writer.options]
        if getattr(options, word) is not None and options.format not in owners:
            raise UserError(f"--{word.replace('_', '-')} goes with --format {' or '.join(owners)}.")
    for word in ("text", "task_items"):
        if options.format in ("transformers", "lora") and getattr(options, word) is not None:
            raise UserError(
                f"--{word.replace('_', '-')} goes with a format whose weights are rounded, like --format gguf."
            )
    if options.format == "transformers":
        return None
    if options.dtype is not None:
        raise UserError(f"--dtype is the type of a transformers folder; --format {options.format} has its own types.")
    # The name becomes a file's name.
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", card_facts["name"]).strip("-.") or "model"
    checked = FormatOptions(options.format, options.format, slug, is_checked=not options.no_check)
    if options.format == "lora":
        return replace(checked, merged=merged)
    if options.text is not None:
        checked = replace(checked, text=_text_file(options.text))
    checked = replace(checked, task_items=options.task_items)
    if checked.task_items is not None and checked.task_items < 0:
        raise UserError(f"--task-items {options.task_items}: must be 0, for no task score, or more.")
    return formats[options.format].check(options, source, card_facts, checked)


def _text_file(word: str) -> Path:
    file = user_path(word)
    if not file.is_file():
        raise UserError(f"--text {word}: no such file; name a text of some thousand words in UTF-8.")
    return file


def write_format(
    source: Source, scratch: Path, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Fidelity | None]:
    """Write the folder ``scratch/new`` in a format; return its description and its cost."""
    from align.export.export import export
    from align.export.task_score import ITEMS, SMALL

    plain = scratch / "plain"
    written = export(source, plain)
    if options.task_items is None:
        is_small = written.parameters < SMALL
        options = replace(options, task_items=0 if is_small else ITEMS)
        if is_small and options.is_checked:
            log(
                f"no task score for a model of {written.parameters:,} parameters, which solves no instruction; "
                f"--task-items {ITEMS} measures it"
            )
    return writers()[options.format].write(source, scratch, plain, written, options, log)


def write_adapter(
    source: Source, scratch: Path, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Agreement | None]:
    """Write the folder ``scratch/new`` with the adapter of ``source``; return its description and its comparison."""
    from align.export.export import Written, file_sizes
    from align.export.lora import check_lora, write_lora
    from align.export.verify import verify_adapter
    from align.models.loading import load_tokenizer
    from align.models.pretrained import open_config

    if source.adapter is None:
        raise ValueError("an adapter has a folder of its own")
    adapter = check_lora(source.adapter)
    out = scratch / "new"
    write_lora(adapter, out, options.base_name)
    # vLLM and peft then render the template that the adapter was trained with.
    load_tokenizer(source.tokenizer_folder).save_pretrained(out)
    kind = (open_config(source.folder).architectures or ["a causal model"])[0]
    written = Written(
        is_reward=False,
        dtype=adapter.dtype,
        parameters=adapter.parameters,
        architecture=f"LoRA of rank {adapter.rank} for {kind}",
        files=file_sizes(out),
        serving_advice=[f"Its base is {options.base_name}. Any other base gives other answers without an error."],
        format="lora",
    )
    if not options.is_checked:
        return written, None
    return written, verify_adapter(source, options.merged, out, scratch / "check", log=log)


def measure(
    source: Source,
    scratch: Path,
    options: FormatOptions,
    sizes: tuple[int, int],
    engine: Job | None,
    log: Callable[[str], None],
    reason: str | None,
    activations: Literal["int8", "float8"] | None = None,
) -> Fidelity:
    """Measure what the format of ``scratch/new`` costs, with the weights of ``scratch/read``.

    Args:
        sizes: Bytes of the written file or weights, and of those they were written from.
        engine: Reads ``scratch/new`` as well, if there is one.
        reason: Reason that no engine has read it.
        activations: Type to which the format rounds activations.
    """
    from align.export import fidelity

    comparison = fidelity.Comparison(
        source,
        scratch / "read",
        options.type,
        scratch / "check",
        options.text,
        activations,
        # llama.cpp does not read transformers folders.
        plain=scratch / "plain" if engine is not None and engine.engine == "vllm" else None,
        items=options.task_items or 0,
        log=log,
    )
    measured = fidelity.measure(comparison, sizes, engine)
    return measured if reason is None else replace(measured, unchecked=reason)


def weight_bytes(folder: Path) -> int:
    """Return the size of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
