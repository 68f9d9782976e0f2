"""``align export --format``: what each format needs before it is written, and its writing with its measurement."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.config.user_paths import user_path
from align.data.builds.build_files import is_build
from align.errors import UserError
from align.export.export import Source
from align.store.artifacts import Artifact, Kind

if TYPE_CHECKING:
    from align.export.answers import Job
    from align.export.export import Agreement, Written
    from align.export.fidelity import Fidelity
    from align.export.formats.calibrated import Calibration

FORMATS = ("transformers", "gguf", "fp8", "w8a8", "gptq", "awq", "lora")
OPTIONS = {
    "gguf_type": ("gguf",),
    "llama_quantize": ("gguf",),
    "llmcompressor": ("gptq", "awq"),
    "calibration": ("gptq", "awq"),
    "calibration_rows": ("gptq", "awq"),
    "group_size": ("gptq", "awq"),
}
"""Option → the formats that it belongs to."""
TRAINED_ON = (Kind.INSTRUCTIONS, Kind.PREFERENCES, Kind.UNPAIRED, Kind.TEXTS)
"""Data with answers that a checkpoint was trained on."""


@dataclass(frozen=True)
class FormatOptions:
    """Options of a format, checked."""

    format: str
    type: str
    """Type of the weights, and the name of the format's limit."""
    name: str
    quantizer: Path | None = None
    """Path of llama-quantize."""
    text: Path | None = None
    is_checked: bool = True
    task_items: int | None = None
    """Instructions that checkpoint and export answer for a task score; None to choose by the size of the model."""
    merged: Path | None = None
    """For ``lora``: the checkpoint with the adapter merged in."""
    base_name: str = ""
    """For ``lora``: the base in the adapter's config."""
    calibration: Calibration | None = None
    """For ``gptq`` and ``awq``."""


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of formats."""
    parser.add_argument("--format", choices=FORMATS, default="transformers", help="what to write")
    parser.add_argument("--gguf-type", choices=("f16", "q8_0", "q4_k"), help="type of GGUF's matrices (default: q8_0)")
    parser.add_argument("--llama-quantize", metavar="PATH", help="llama.cpp's program for q4_k (default: on the PATH)")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="interpreter with llm-compressor, for gptq and awq")
    parser.add_argument(
        "--calibration", metavar="BUILD", help="rows for gptq and awq: a recipe, a build (default: the training data)"
    )
    parser.add_argument("--calibration-rows", type=int, metavar="N", help="number of these rows (default: 128)")
    parser.add_argument("--group-size", type=int, metavar="N", help="numbers with one scale in gptq and awq")
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
    for word, formats in OPTIONS.items():
        if getattr(options, word) is not None and options.format not in formats:
            raise UserError(f"--{word.replace('_', '-')} goes with --format {' or '.join(formats)}.")
    for word in ("text", "task_items"):
        if options.format in ("transformers", "lora") and getattr(options, word) is not None:
            raise UserError(
                f"--{word.replace('_', '-')} goes with a format whose weights are rounded, like --format gguf."
            )
    if options.format == "transformers":
        return None
    if options.dtype is not None:
        raise UserError(f"--dtype is the type of a transformers folder; --format {options.format} has its own types.")
    from align.export.formats.calibrated import CALIBRATED_FORMATS
    from align.export.formats.compressed import COMPRESSED_FORMATS, check_compressed_source
    from align.export.formats.gguf_export import check_gguf_source, find_quantizer

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
    if options.format in COMPRESSED_FORMATS:
        check_compressed_source(source, options.format)
        return checked
    if options.format in CALIBRATED_FORMATS:
        check_compressed_source(source, options.format)
        return replace(checked, calibration=_check_calibration(options, source, card_facts["lineage"]))
    checked = replace(checked, type=options.gguf_type or "q8_0")
    if checked.type == "q4_k":
        checked = replace(checked, quantizer=find_quantizer(options.llama_quantize))
    check_gguf_source(source)
    return checked


def _check_calibration(options: argparse.Namespace, source: Source, lineage: Sequence[Artifact]) -> Calibration:
    """Return the environment and the rows of a calibration. Raises ``UserError`` for what is missing or does not fit.

    Without ``--calibration`` the rows are those that the checkpoint was trained on, or else embedded instructions.
    """
    from align.cli.arguments import Build, find_build
    from align.export.formats.calibrated import (
        ROWS,
        Calibration,
        check_python,
        choose_group_size,
        read_calibration,
    )

    count = ROWS if options.calibration_rows is None else options.calibration_rows
    if count < 1:
        raise UserError(f"--calibration-rows {count}: must be at least 1.")
    python, version = check_python(options.llmcompressor, options.format)
    group_size = choose_group_size(source.folder, options.group_size)
    build: Build | None = None
    if options.calibration is not None:
        build = find_build(options.calibration, options.store)
    else:
        trained_on = [artifact for artifact in lineage if artifact.kind in TRAINED_ON and is_build(artifact.path)]
        if trained_on:
            build = Build(trained_on[-1].path, trained_on[-1].stage)
    rows = read_calibration(None if build is None else build.folder, count, source.tokenizer_folder)
    return Calibration(python, version, rows, "embedded instructions" if build is None else build.name, group_size)


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
    write = _write_compressed if options.calibration is None else _write_calibrated
    if options.format == "gguf":
        write = _write_gguf
    return write(source, scratch, plain, written, options, log)


def _write_gguf(
    source: Source, scratch: Path, plain: Path, written: Written, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Fidelity | None]:
    from align.export.answers import Job
    from align.export.export import file_sizes
    from align.export.formats import llama_cpp
    from align.export.formats.gguf_export import GGUF_TYPES, export_gguf
    from align.export.formats.gguf_file import read_back

    out = scratch / "new"
    kind = next(kind for kind in GGUF_TYPES if kind == options.type)
    file = export_gguf(plain, out, options.name, kind, options.quantizer, log)
    written = replace(
        written, format="gguf", dtype=options.type, files=file_sizes(out), architecture=file.plan.family.arch
    )
    if not options.is_checked:
        return written, None
    log("reading the file back")
    read_back(file.plan, file.path, scratch / "read", is_requantized=options.quantizer is not None)
    engine = None
    reason = None
    if llama_cpp.is_installed():
        engine = Job("llama.cpp", str(file.path), "distributions", [], ends=list(file.plan.special.ends))
    else:
        reason = "llama-cpp-python is not installed, so llama.cpp has not read the file"
    sizes = (file.path.stat().st_size, _weight_bytes(plain))
    return written, _measure(source, scratch, options, sizes, engine, log, reason)


def _write_compressed(
    source: Source, scratch: Path, plain: Path, written: Written, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Fidelity | None]:
    from align.export.export import file_sizes
    from align.export.formats.compressed import SCHEMES, CompressedFormat, read_compressed, write_compressed

    out = scratch / "new"
    name: CompressedFormat = "fp8" if options.format == "fp8" else "w8a8"
    count = write_compressed(plain, out, name)
    log(f"rounded {count} matrices to {name}")
    written = replace(written, format=name, dtype=name, files=file_sizes(out))
    if not options.is_checked:
        return written, None
    read_compressed(plain, out, scratch / "read", name)
    return written, _measure_in_vllm(source, scratch, options, log, SCHEMES[name].activations)


def _write_calibrated(
    source: Source, scratch: Path, plain: Path, written: Written, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Fidelity | None]:
    from align.data.card import plain as plain_text
    from align.export.export import file_sizes
    from align.export.formats.calibrated import CALIBRATED_FORMATS, EXPERIMENTAL, read_calibrated, write_calibrated

    calibration = options.calibration
    if calibration is None:
        raise ValueError(f"{options.format} needs a calibration")
    out = scratch / "new"
    name = next(name for name in CALIBRATED_FORMATS if name == options.format)
    tokens = sum(map(len, calibration.rows))
    rows = f"{len(calibration.rows):,} rows ({tokens:,} tokens) of {plain_text(calibration.source)}"
    if name == "gptq":
        log(EXPERIMENTAL)
    log(f"llm-compressor {calibration.version} calibrates with {rows}")
    write_calibrated(plain, out, name, calibration, scratch / "llmcompressor")
    advice = (
        f"Its linear layers have 4-bit weights in groups of {calibration.group_size}, rounded by {name.upper()} in "
        f"llm-compressor {calibration.version} with {rows}."
    )
    written = replace(
        written,
        format=name,
        dtype=name,
        files=file_sizes(out),
        serving_advice=[advice, *([EXPERIMENTAL] if name == "gptq" else []), *written.serving_advice],
    )
    if not options.is_checked:
        return written, None
    log("reading the folder back")
    read_calibrated(plain, out, scratch / "read", name)
    return written, _measure_in_vllm(source, scratch, options, log)


def _measure_in_vllm(
    source: Source,
    scratch: Path,
    options: FormatOptions,
    log: Callable[[str], None],
    activations: Literal["int8", "float8"] | None = None,
) -> Fidelity:
    """Measure the folder ``scratch/new`` with the weights that were read back, and in vLLM if it is installed."""
    from align.export.answers import Job

    out = scratch / "new"
    engine = None
    reason: str | None = "vLLM is not installed"
    if importlib.util.find_spec("vllm") is not None:
        reason = None
        engine = Job("vllm", str(out), "distributions", [], dtype="bfloat16")
    sizes = (_weight_bytes(out), _weight_bytes(scratch / "plain"))
    return _measure(source, scratch, options, sizes, engine, log, reason, activations)


def write_adapter(
    source: Source, scratch: Path, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Agreement | None]:
    """Write the folder ``scratch/new`` with the adapter of ``source``; return its description and its comparison."""
    from align.export.export import Written, file_sizes
    from align.export.formats.lora import check_lora, write_lora
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


def _measure(
    source: Source,
    scratch: Path,
    options: FormatOptions,
    sizes: tuple[int, int],
    engine: Job | None,
    log: Callable[[str], None],
    reason: str | None,
    activations: Literal["int8", "float8"] | None = None,
) -> Fidelity:
    from align.export.fidelity import Comparison, measure

    comparison = Comparison(
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
    fidelity = measure(comparison, sizes, engine)
    return fidelity if reason is None else replace(fidelity, unchecked=reason)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
