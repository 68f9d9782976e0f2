"""Export 4-bit weights by GPTQ or AWQ, which llm-compressor computes from calibration rows in another environment.

llm-compressor needs another version of compressed-tensors than vLLM, so the two cannot be in one environment. Its
interpreter runs ``llmcompressor_script.py``, which imports nothing of align. The result is compressed-tensors' format
``pack-quantized``: eight numbers of 4 bits in an int32, one scale per group of a row, and for AWQ a zero point as well.
Embeddings, norms, biases and the output head keep the checkpoint's type; AWQ moves scales into norms and biases.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from align.errors import StageFailed, UserError
from align.export.export import read_json, stored_type
from align.extensions.formats.compressed import linear_weights
from align.store.json_files import write_atomically

CalibratedFormat = Literal["gptq", "awq"]
CALIBRATED_FORMATS: tuple[CalibratedFormat, ...] = ("gptq", "awq")
EXPERIMENTAL = (
    "GPTQ is experimental: its answers may be further from the checkpoint's than 4 bits explain, for a reason that is "
    "not known. Prefer awq or w8a8."
)
SCRIPT = Path(__file__).with_name("llmcompressor_script.py")
MOST_TOKENS = 2048
"""Tokens of a calibration row; the rest of a longer row is cut."""
JOINED = 512
"""Tokens up to which short rows are joined: a step of llm-compressor for a short row lasts nearly as long."""
ROWS = 128
"""Default number of calibration rows."""
GROUPS = (128, 64, 32)
"""Sizes of groups that vLLM's kernels have, smallest file first; a row must be a whole number of groups."""
LAYOUT = "pack-quantized"
"""compressed-tensors' name of the format."""
WORD = "_packed"
SCALE = "_scale"
ZERO = "_zero_point"
SHAPE = "_shape"
"""Endings of the names of a matrix's tensors."""
PER_WORD = 8
MIDDLE = 8
"""The number that stands for zero if there is no zero point."""
LARGEST_ERROR = 0.5
"""Largest norm of a matrix's error by GPTQ, relative to the matrix's norm: far above what 4 bits round."""
REMEDY = "Make one: python -m venv lc && lc/bin/pip install llmcompressor, then --llmcompressor lc/bin/python."


@dataclass(frozen=True)
class Calibration:
    """An environment with llm-compressor, and what it calibrates with."""

    python: Path
    version: str
    """llm-compressor's version."""
    rows: list[list[int]]
    """Calibration rows as token ids."""
    source: str
    """Name of the rows, for the model card."""
    group_size: int


@dataclass(frozen=True)
class Job:
    """A job of the script."""

    model: str
    output: str
    method: CalibratedFormat
    rows: list[list[int]]
    group_size: int
    is_symmetric: bool
    dtype: str
    """Type of the checkpoint's weights."""
    ignore: list[str]
    """Names of linear layers that keep their type."""


def check_python(word: str | None, name: str) -> tuple[Path, str]:
    """Return the interpreter of ``--llmcompressor`` and its version of the package.

    Raises ``UserError`` if there is no interpreter, or if it cannot import what a job needs.
    """
    if word is None:
        raise UserError(f"--format {name} needs an interpreter with llm-compressor. {REMEDY}")
    program = shutil.which(word)
    if program is None:
        raise UserError(f"--llmcompressor {word}: is no program. {REMEDY}")
    try:
        done = subprocess.run(
            _command(Path(program), "--version"), capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise UserError(f"--llmcompressor {word}: cannot be started ({error.strerror or error}).") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = _last_line(done.stderr)
        raise UserError(f"--llmcompressor {word}: cannot import llm-compressor ({reason}). {REMEDY}")
    return Path(program), lines[-1].strip()


def _command(python: Path, word: str) -> list[str]:
    """Return the script's command; with ``-I`` it imports from neither PYTHONPATH nor the script's folder."""
    return [str(python), "-I", str(SCRIPT), word]


def _last_line(log: str) -> str:
    lines = log.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def choose_group_size(folder: Path, wanted: int | None) -> int:
    """Return the size of the groups: ``wanted``, or the largest that divides the rows of every linear layer.

    Raises ``UserError`` for a size that does not divide them, and for a model without linear layers.
    """
    from align.models.pretrained import empty_model

    model = empty_model(folder)
    names = linear_weights(folder)
    widths = sorted({model.get_parameter(name).shape[1] for name in names})
    if not widths:
        raise UserError(f"{folder}: has no linear layers to round. Use --format transformers.")
    sizes = [size for size in GROUPS if not any(width % size for width in widths)]
    if wanted in sizes:
        return int(wanted)
    listed = ", ".join(map(str, widths))
    if wanted is not None:
        fitting = f"Sizes that do: {', '.join(map(str, sizes))}." if sizes else "No size does; use --format w8a8."
        raise UserError(f"--group-size {wanted}: does not divide all rows of {folder} ({listed} numbers). {fitting}")
    if not sizes:
        raise UserError(
            f"{folder}: its linear layers have rows of {listed} numbers, which groups of {GROUPS[-1]} do not divide. "
            "Use --format w8a8."
        )
    return sizes[0]


def read_calibration(build: Path | None, count: int, tokenizer_folder: Path) -> list[list[int]]:
    """Return calibration rows as token ids: of a build's training split, spread over it, or embedded instructions.

    Raises ``UserError`` for a build without rows, and for rows that the chat template does not render.
    """
    from align.data.builds.build_files import count_rows, rows_by_number
    from align.data.families.embedded import generate
    from align.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(tokenizer_folder)
    if build is None:
        return _render(tokenizer, generate(count, seed=0))
    total = count_rows(build, "train")
    # The first rows of a build may all have one source.
    numbers = [index * total // count for index in range(count)] if total > count else range(total)
    selected = rows_by_number(build, "train", numbers)
    rows = _render(tokenizer, [selected[number] for number in numbers])
    if not rows:
        raise UserError(f"--calibration {build}: has no training rows. Name another build or recipe.")
    return rows


def _render(tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Return rows as token ids, with the answers that are trained on."""
    from align.data.rows import answer_side
    from align.models.chat.render import render_answered, render_prompt

    rendered = []
    for row in rows:
        if "text" in row:
            tokens = tokenizer(row["text"]).input_ids
        elif row.get(answer_side(row)):
            tokens = render_answered(tokenizer, row)
        else:
            tokens = render_prompt(tokenizer, row["prompt"], row.get("tools"))
        rendered.append([int(token) for token in tokens][:MOST_TOKENS])
    return [row for row in rendered if row]


def join_rows(rows: Iterable[list[int]]) -> list[list[int]]:
    """Return rows joined in order, up to ``JOINED`` tokens; a longer row stays as it is."""
    joined: list[list[int]] = []
    for row in rows:
        if joined and len(joined[-1]) + len(row) <= JOINED:
            joined[-1] = [*joined[-1], *row]
        else:
            joined.append(row)
    return joined


def write_calibrated(plain: Path, out: Path, name: CalibratedFormat, calibration: Calibration, scratch: Path) -> None:
    """Write a transformers folder in 4 bits to a new folder ``out``; ``scratch`` is a folder for the process.

    Raises ``StageFailed`` if llm-compressor fails, or writes another format.
    """
    scratch.mkdir(parents=True)
    written = scratch / "written"
    job = Job(
        str(plain),
        str(written),
        name,
        join_rows(calibration.rows),
        calibration.group_size,
        is_symmetric=name == "gptq",
        dtype=stored_type(plain),
        ignore=_kept_layers(plain),
    )
    write_atomically(scratch / "job.json", asdict(job))
    log = scratch / "log.txt"
    command = _command(calibration.python, str(scratch / "job.json"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as file:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode != 0 or not (written / "config.json").is_file():
        reason = _last_line(log.read_text(encoding="utf-8", errors="replace"))
        raise StageFailed(f"llm-compressor failed (exit code {done.returncode}): {reason}")
    quantization = read_json(written / "config.json").get("quantization_config") or {}
    if quantization.get("format") != LAYOUT:
        raise StageFailed(f"llm-compressor wrote the format {quantization.get('format')}, not {LAYOUT}.")
    # Tokenizer, template and config are the checkpoint's own: another version of transformers may write them otherwise.
    out.mkdir(parents=True)
    for path in plain.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, out / path.name)
    for path in written.glob("*.safetensors*"):
        path.rename(out / path.name)
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    write_atomically(out / "config.json", config | {"quantization_config": quantization})


def _kept_layers(folder: Path) -> list[str]:
    """Return the name of the output head, as the model names it."""
    from align.models.pretrained import empty_model

    model = empty_model(folder)
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def read_calibrated(plain: Path, folder: Path, out: Path, name: CalibratedFormat) -> None:
    """Compare a 4-bit folder with its checkpoint; write a transformers folder with its dequantized weights.

    Raises ``StageFailed`` for a tensor that is missing, unexpected, or not a rounded tensor of the checkpoint.
    """
    from safetensors.torch import load_file, save_file

    written: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        written |= load_file(file)
    matrices = linear_weights(plain)
    out.mkdir(parents=True)
    for file in sorted(plain.iterdir()):
        if not file.is_file():
            continue
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
            continue
        values = {}
        for key, weight in load_file(file).items():
            read = _read_matrix if key in matrices else _read_plain
            values[key] = read(key, weight.float(), written, name)
        save_file(values, out / file.name, metadata={"format": "pt"})
    if written:
        raise StageFailed(f"llm-compressor wrote tensors that the checkpoint does not have: {', '.join(written)}.")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write_atomically(out / "config.json", config | {"dtype": "float32"})


def _read_matrix(key: str, weight: Any, written: dict[str, Any], name: CalibratedFormat) -> Any:
    """Remove a matrix's tensors from ``written`` and return its dequantized weights, compared with ``weight``."""
    import torch

    columns = weight.shape[1]
    numbers = unpack(_take(written, key + WORD), columns)
    scale = _take(written, key + SCALE).float()
    zero: Any = MIDDLE
    if name == "awq":
        zero = unpack(_take(written, key + ZERO).T.contiguous(), weight.shape[0]).T
        zero = zero.repeat_interleave(columns // scale.shape[1], dim=1)
    shape = _take(written, key + SHAPE).tolist()
    if shape != list(weight.shape) or numbers.shape != weight.shape:
        raise StageFailed(f"llm-compressor wrote {key} with the shape {shape}, not {list(weight.shape)}.")
    values = (numbers - zero).float() * scale.repeat_interleave(columns // scale.shape[1], dim=1)
    _require_finite(key, values)
    # AWQ scales columns, and norms inversely. The answers show whether both fit.
    error = float(torch.linalg.norm(values - weight) / torch.linalg.norm(weight).clamp(min=1e-30))
    if name == "gptq" and error > LARGEST_ERROR:
        raise StageFailed(f"{key} differs by {100 * error:.0f} % of its norm, more than 4 bits round.")
    return values


def _read_plain(key: str, weight: Any, written: dict[str, Any], name: CalibratedFormat) -> Any:
    """Remove a tensor that is not rounded from ``written`` and return it, compared with ``weight``."""
    values = _take(written, key).float()
    _require_finite(key, values)
    is_scaled = name == "awq" and weight.ndim == 1
    if values.shape != weight.shape or not (is_scaled or bool((values == weight).all())):
        raise StageFailed(f"llm-compressor changed {key}, which the format keeps as it is.")
    return values


def unpack(words: Any, columns: int) -> Any:
    """Return the numbers of 4 bits in a matrix of int32, (rows, columns), 0 to 15; the lowest bits come first."""
    import torch

    shifts = torch.arange(PER_WORD, dtype=torch.int32) * 4
    return ((words.unsqueeze(-1) >> shifts) & 0xF).flatten(start_dim=1)[:, :columns]


def _take(written: dict[str, Any], key: str) -> Any:
    if key not in written:
        raise StageFailed(f"llm-compressor wrote no tensor {key}.")
    return written.pop(key)


def _require_finite(key: str, values: Any) -> None:
    if not bool(values.isfinite().all()):
        raise StageFailed(f"llm-compressor wrote numbers in {key} that are not finite.")
