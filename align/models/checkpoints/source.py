"""Resolve the source of a base model and what pins its identity. Torch-free.

A source is a built-in name, a transformers folder, a peft adapter's folder, a ``.gguf`` file, or a Hub name. A Hub name
with a commit is resolved without the network; for any other revision the Hub or its cache names the commit.
Excluded: fetching and conversion (``built_in.py``, ``stages/model.py``).

Recognize checkpoints of DeepSpeed, FSDP and verl, which are pickled, and name the command that converts them.

align opens no pickle: whoever wrote one runs code on the machine that reads it. The tools that wrote these checkpoints
convert them (docs/decisions/0043-checkpoints-from-elsewhere.md). Torch-free.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from align.config.hub_commits import HUB_NAME, find_commit
from align.config.user_paths import user_path
from align.config.validation import suggest
from align.errors import UserError
from align.models.built_in import NAME as EMBEDDED
from align.models.built_in import WHEEL_SHA256
from align.models.checkpoints import files
from align.models.checkpoints.files import CONFIG
from align.models.checkpoints.folder_checks import check_adapter, check_folder, check_gguf
from align.store.fingerprint import digest, file_digest, file_state

TINY = "tiny"
TINY_VERSION = 1
"""Increased when ``make_tiny`` writes other weights for the same seed."""
BUILT_IN = (EMBEDDED, TINY)

STORED_ADAPTER = Path("adapter", "adapter.json")
"""In a model folder, the description of an adapter that only align applies (``align.models.tuning.stored``)."""


class Origin(StrEnum):
    """Way in which a source is fetched."""

    EMBEDDED = "embedded"
    TINY = "tiny"
    FOLDER = "folder"
    ADAPTER = "adapter"
    GGUF = "gguf"
    HUB = "hub"


@dataclass(frozen=True)
class Source:
    """A validated source. ``path`` is set for a folder or a file, ``revision`` (a commit) for a Hub name."""

    origin: Origin
    name: str
    path: Path | None = None
    revision: str | None = None


def resolve(source: str, revision: str | None, base: Path) -> Source:
    """Validate ``source`` without fetching it; relative paths start at ``base``.

    ``revision`` of a Hub name is a branch, a tag or a commit, by default ``main``. Raises ``UserError`` for a path that
    is missing, a model folder with a file that is damaged or hostile, a Hub name or revision that does not exist, and a
    name that is none of these.
    """
    if source in BUILT_IN:
        if revision is not None:
            raise UserError(f"revision: the built-in model '{source}' is pinned already; leave revision out.")
        return Source(Origin.EMBEDDED if source == EMBEDDED else Origin.TINY, source)
    path = user_path(source, base)
    if path.exists():
        if revision is not None:
            raise UserError(f"revision: '{source}' is a path, pinned by its contents; leave revision out.")
        return _local(source, path)
    # These look like paths, so the message must not suggest a Hub name.
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        raise UserError(f"source: there is no '{path}'; give the path of a model folder or of a .gguf file.")
    if not HUB_NAME.fullmatch(source):
        raise UserError(
            f"source: '{source}' is neither a built-in model ({', '.join(BUILT_IN)}), nor a path under '{base}', "
            f"nor a Hub name like 'organization/model'.{suggest(source, BUILT_IN)}"
        )
    try:
        return Source(Origin.HUB, source, revision=find_commit(source, revision, "model"))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("revision: ") else f"source: {text}") from None


def _local(source: str, path: Path) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"source: '{source}' is a file but no .gguf; give a model folder or a .gguf file.")
        _explain(check_gguf, path)
        return Source(Origin.GGUF, source, path=path)
    if files.is_adapter(path):
        _explain(check_adapter, path)
        return Source(Origin.ADAPTER, source, path=path)
    if not files.has_weights(path):
        sharded = explain_sharded(path)
        if sharded is not None:
            raise UserError(f"source: {sharded}")
    _explain(check_folder, path)
    if (path / STORED_ADAPTER).is_file():
        raise UserError(
            f"source: '{source}' carries an adapter that cannot be merged into its weights ({STORED_ADAPTER}), and a "
            "model stage reads weights only. Use the finished artifact with `stage: artifact`."
        )
    return Source(Origin.FOLDER, source, path=path)


def _explain(check: Callable[[Path], None], path: Path) -> None:
    try:
        check(path)
    except UserError as error:
        raise UserError(f"source: {error}") from None


def identity(source: str, revision: str | None, base: Path) -> str:
    """Return text that changes whenever the model does: a commit, a checksum, or a digest of the files' contents."""
    resolved = resolve(source, revision, base)
    if resolved.origin is Origin.EMBEDDED:
        return f"embedded:{WHEEL_SHA256}"
    if resolved.origin is Origin.TINY:
        return f"tiny:{TINY_VERSION}"
    if resolved.origin is Origin.HUB:
        return f"hub:{resolved.name}@{resolved.revision}"
    assert resolved.path is not None
    if resolved.origin is Origin.GGUF:
        return f"gguf:{_digest(resolved.path)}"
    contents = {name: _digest(file) for name, file in files.files_read(resolved.path).items()}
    return f"{resolved.origin}:{digest(contents)}"


def _digest(path: Path) -> str:
    # The state identifies an unchanged file, so a digest of gigabytes is computed once.
    return _cached_digest(path, tuple(file_state(path.stat())))


@lru_cache(maxsize=1024)
def _cached_digest(path: Path, state: tuple[int, ...]) -> str:
    """Return a file's digest, computed once per process while its state is unchanged: a plan needs it often."""
    return file_digest(path)


DEEPSPEED = "*_model_states.pt"
"""States that every rank of DeepSpeed writes, in ``global_step100`` below the checkpoint."""
FSDP = "*.distcp"
"""Files of torch.distributed.checkpoint, in ``pytorch_model_fsdp_0`` below a checkpoint of accelerate."""
VERL = "model_world_size_*_rank_*.pt"


def explain_sharded(folder: Path) -> str | None:
    """Return the message for a sharded checkpoint: its kind, and the commands that convert it; None for any other."""
    converted = folder.parent / f"{folder.name}-converted"
    for name, pattern, command in (
        ("DeepSpeed's", DEEPSPEED, _deepspeed),
        ("torch.distributed.checkpoint's (FSDP)", FSDP, _fsdp),
        ("verl's", VERL, _verl),
    ):
        shards = next((part for part in _folders(folder) if any(part.glob(pattern))), None)
        if shards is not None:
            return (
                f"{folder}: is a checkpoint in {name} format, whose files are pickles, which run code when opened; "
                "align loads safetensors only. Where you trust it, convert it once, and name the result as source:\n"
                f"  {command(folder, shards, converted)}\n"
                f"  {_settings(folder, shards, converted)}"
            )
    return None


def _folders(folder: Path) -> list[Path]:
    """Return the folder and those below it in which the tools put their shards, the newest step first."""
    below = sorted((path for path in folder.iterdir() if path.is_dir()), key=_step, reverse=True)
    return [folder, *below]


def _step(folder: Path) -> tuple[int, str]:
    digits = "".join(character for character in folder.name if character.isdigit())
    return (int(digits[:18]) if digits else -1, folder.name)


def _deepspeed(folder: Path, shards: Path, converted: Path) -> str:
    # DeepSpeed's own script cannot write tied embeddings as safetensors, and the copy of it in a checkpoint is not run.
    above = shards.parent if shards == folder else folder
    code = (
        "import sys; from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read; "
        "from transformers import AutoConfig, AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).float(); "
        "model.load_state_dict(read(sys.argv[2], sys.argv[3])); model.save_pretrained(sys.argv[4])"
    )
    settings = _settings_folder(folder, shards)
    config = "BASE" if settings is None else _quoted(settings)
    return f'python -c "{code}" {config} {_quoted(above)} {_quoted(Path(shards.name))} {_quoted(converted)}'


def _fsdp(folder: Path, shards: Path, converted: Path) -> str:
    return f"accelerate merge-weights {_quoted(shards)} {_quoted(converted)}"


def _verl(folder: Path, shards: Path, converted: Path) -> str:
    command = "python -m verl.model_merger merge --backend fsdp"
    return f"{command} --local_dir {_quoted(shards)} --target_dir {_quoted(converted)}"


def _settings(folder: Path, shards: Path, converted: Path) -> str:
    """Return the command that adds what the weights' tools leave out: config and tokenizer."""
    settings = _settings_folder(folder, shards)
    if settings is None:
        return (
            f"hf download BASE --local-dir {_quoted(converted)} --include '*.json'  # config and tokenizer of the base"
        )
    names = " -o ".join(f"-name '*{suffix}'" for suffix in (".json", ".jinja", ".model", ".txt"))
    return f"find {_quoted(settings)} -maxdepth 1 \\( {names} \\) -exec cp {{}} {_quoted(converted)} \\;"


def _settings_folder(folder: Path, shards: Path) -> Path | None:
    """Return the folder with the model's config, at a place where the tools write it."""
    return next(
        (place for place in (folder, shards.parent, shards / "huggingface") if (place / CONFIG).is_file()), None
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
