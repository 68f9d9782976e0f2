"""``align export --format`` gguf, fp8, w8a8, gptq and awq: options, checks, and writing with its measurement."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.cli.export_formats import FormatOptions, Writer, measure, weight_bytes
from align.data.builds.build_files import is_build
from align.errors import UserError
from align.export.export import Source
from align.store.artifacts import Artifact, Kind

if TYPE_CHECKING:
    from align.export.export import Written
    from align.export.fidelity import Fidelity
    from align.extensions.formats.calibrated import Calibration

TRAINED_ON = (Kind.INSTRUCTIONS, Kind.PREFERENCES, Kind.UNPAIRED, Kind.TEXTS)
"""Data with answers that a checkpoint was trained on."""


def _add_gguf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gguf-type", choices=("f16", "q8_0", "q4_k"), help="type of GGUF's matrices (default: q8_0)")
    parser.add_argument("--llama-quantize", metavar="PATH", help="llama.cpp's program for q4_k (default: on the PATH)")


def _add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="interpreter with llm-compressor, for gptq and awq")
    parser.add_argument(
        "--calibration", metavar="BUILD", help="rows for gptq and awq: a recipe, a build (default: the training data)"
    )
    parser.add_argument("--calibration-rows", type=int, metavar="N", help="number of these rows (default: 128)")
    parser.add_argument("--group-size", type=int, metavar="N", help="numbers with one scale in gptq and awq")


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """Add no option."""


def _check_gguf(
    options: argparse.Namespace, source: Source, card_facts: Mapping[str, Any], checked: FormatOptions
) -> FormatOptions:
    from align.extensions.formats.gguf_export import check_gguf_source, find_quantizer

    checked = replace(checked, type=options.gguf_type or "q8_0")
    if checked.type == "q4_k":
        checked = replace(checked, found=find_quantizer(options.llama_quantize))
    check_gguf_source(source)
    return checked


def _check_compressed(
    options: argparse.Namespace, source: Source, card_facts: Mapping[str, Any], checked: FormatOptions
) -> FormatOptions:
    from align.extensions.formats.compressed import check_compressed_source

    check_compressed_source(source, options.format)
    return checked


def _check_calibrated(
    options: argparse.Namespace, source: Source, card_facts: Mapping[str, Any], checked: FormatOptions
) -> FormatOptions:
    checked = _check_compressed(options, source, card_facts, checked)
    return replace(checked, found=_check_calibration(options, source, card_facts["lineage"]))


def _check_calibration(options: argparse.Namespace, source: Source, lineage: Sequence[Artifact]) -> Calibration:
    """Return the environment and the rows of a calibration. Raises ``UserError`` for what is missing or does not fit.

    Without ``--calibration`` the rows are those that the checkpoint was trained on, or else embedded instructions.
    """
    from align.cli.arguments import Build, find_build
    from align.extensions.formats.calibrated import (
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


def _write_gguf(
    source: Source, scratch: Path, plain: Path, written: Written, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Fidelity | None]:
    from align.export.answers import Job
    from align.export.distributions import has_llama_cpp
    from align.export.export import file_sizes
    from align.extensions.formats.gguf_export import GGUF_TYPES, export_gguf
    from align.extensions.formats.gguf_file import read_back

    out = scratch / "new"
    kind = next(kind for kind in GGUF_TYPES if kind == options.type)
    file = export_gguf(plain, out, options.name, kind, options.found, log)
    written = replace(
        written, format="gguf", dtype=options.type, files=file_sizes(out), architecture=file.plan.family.arch
    )
    if not options.is_checked:
        return written, None
    log("reading the file back")
    read_back(file.plan, file.path, scratch / "read", is_requantized=options.found is not None)
    engine = None
    reason = None
    if has_llama_cpp():
        engine = Job("llama.cpp", str(file.path), "distributions", [], ends=list(file.plan.special.ends))
    else:
        reason = "llama-cpp-python is not installed, so llama.cpp has not read the file"
    sizes = (file.path.stat().st_size, weight_bytes(plain))
    return written, measure(source, scratch, options, sizes, engine, log, reason)


def _write_compressed(
    source: Source, scratch: Path, plain: Path, written: Written, options: FormatOptions, log: Callable[[str], None]
) -> tuple[Written, Fidelity | None]:
    from align.export.export import file_sizes
    from align.extensions.formats.compressed import SCHEMES, CompressedFormat, read_compressed, write_compressed

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
    from align.extensions.formats.calibrated import CALIBRATED_FORMATS, EXPERIMENTAL, read_calibrated, write_calibrated

    calibration: Calibration = options.found
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
    sizes = (weight_bytes(out), weight_bytes(scratch / "plain"))
    return measure(source, scratch, options, sizes, engine, log, reason, activations)


GGUF = Writer(("gguf_type", "llama_quantize"), _add_gguf_arguments, _check_gguf, _write_gguf)
COMPRESSED = Writer((), _add_nothing, _check_compressed, _write_compressed)
CALIBRATED = Writer(
    ("llmcompressor", "calibration", "calibration_rows", "group_size"),
    _add_calibration_arguments,
    _check_calibrated,
    _write_calibrated,
)
