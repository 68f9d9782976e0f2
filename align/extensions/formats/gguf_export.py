"""Export a checkpoint as a GGUF file for llama.cpp and Ollama: f16, q8_0, or q4_k through llama-quantize."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align.errors import StageFailed, UserError
from align.export.export import Source
from align.extensions.formats.gguf_families import check_config, find_family
from align.extensions.formats.gguf_file import Plan, plan_gguf, write_gguf
from align.extensions.formats.gguf_tokenizer import read_vocabulary
from align.extensions.formats.ollama import MODELFILE, go_template, modelfile, read_turns
from align.models.checkpoints.files import read_optional

GgufType = Literal["f16", "q8_0", "q4_k"]
GGUF_TYPES: tuple[GgufType, ...] = ("f16", "q8_0", "q4_k")
QUANTIZER = "llama-quantize"
Q4_K = "Q4_K_M"
"""llama-quantize's name: most matrices in Q4_K, some in Q6_K, and others where rows are no multiple of 256 numbers."""


@dataclass(frozen=True)
class GgufFile:
    """A written GGUF file with the plan that it was written by."""

    path: Path
    plan: Plan
    type: GgufType
    has_template: bool
    """The Modelfile next to it has the chat template."""


def find_quantizer(named: str | None) -> Path:
    """Return the program llama-quantize. Raises ``UserError`` if it is not found."""
    found = shutil.which(named or QUANTIZER)
    if found is None:
        raise UserError(
            f"--gguf-type q4_k: {named or QUANTIZER} is not {'a program' if named else 'on the PATH'}. Install "
            "llama.cpp, or name its program with --llama-quantize PATH. q8_0 needs no program."
        )
    return Path(found)


def check_gguf_source(source: Source) -> None:
    """Raise ``UserError`` for a checkpoint that GGUF cannot hold, before its weights are read."""
    from align.models.loading import load_tokenizer
    from align.models.pretrained import open_config

    if source.is_reward():
        raise UserError(f"{source.folder}: --format gguf is for models that answer, and this is a reward model.")
    config = open_config(source.folder)
    check_config(find_family(config.model_type, str(source.folder)), config, str(source.folder))
    read_vocabulary(load_tokenizer(source.tokenizer_folder), config.vocab_size, str(source.tokenizer_folder))


def export_gguf(
    plain: Path, out: Path, name: str, kind: GgufType, quantizer: Path | None, log: Callable[[str], object]
) -> GgufFile:
    """Write ``NAME-TYPE.gguf`` and a Modelfile to a new folder ``out``.

    Args:
        plain: A transformers folder.
        out: The folder to write.
        name: Name of the model.
        kind: Type of the matrices.
        quantizer: Path of llama-quantize, for ``q4_k``.
        log: Called with a line for each step.

    Raises:
        UserError: For everything that ``plan_gguf`` and ``write_gguf`` refuse.
        StageFailed: If llama-quantize fails.
    """
    plan = plan_gguf(plain, "f16" if kind == "q4_k" else kind)
    out.mkdir(parents=True)
    path = out / f"{name}-{kind}.gguf"
    if quantizer is None:
        log(f"writing {path.name}")
        write_gguf(plan, path, name)
    else:
        half = out / f"{name}-f16.gguf"
        write_gguf(plan, half, name)
        log(f"quantizing with {quantizer}")
        _quantize(quantizer, half, path)
        half.unlink()
    has_template = _write_modelfile(plan, path)
    return GgufFile(path, plan, kind, has_template)


def _quantize(quantizer: Path, source: Path, target: Path) -> None:
    done = subprocess.run(
        [quantizer, source, target, Q4_K], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0 or not target.is_file():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise StageFailed(f"{quantizer} failed (exit code {done.returncode}): {lines[-1] if lines else 'no message'}")


def _write_modelfile(plan: Plan, gguf: Path) -> bool:
    """Write the Modelfile; return whether it has the chat template."""
    from align.models.loading import load_tokenizer

    turns = read_turns(load_tokenizer(plan.folder))
    bos = plan.special.bos
    added = plan.vocabulary.tokens[bos] if plan.special.adds_bos and bos is not None else ""
    template = None if turns is None else go_template(turns, added)
    generation = read_optional(plan.folder / "generation_config.json")
    (gguf.parent / MODELFILE).write_text(modelfile(gguf.name, plan.ends, generation, template), encoding="utf-8")
    return template is not None
