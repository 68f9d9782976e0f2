"""Stage ``model``: bring a base model into the store as safetensors with a checked tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.stages.model import ModelConfig
from align.errors import UserError
from align.models.files import READ_SUFFIXES
from align.models.folder_checks import check_folder
from align.models.source import Origin, Source, identity, resolve
from align.pipeline.context import StageContext
from align.store.fingerprint import file_digest

if TYPE_CHECKING:
    from align.models.architecture import Architecture


def identities(config: ModelConfig, base: Path) -> dict[str, str]:
    """Return the model's commit or digest, and the digest of the chat template's file."""
    digests = {"source": identity(config.source, config.revision, base)}
    if config.chat_template is not None:
        path = base / config.chat_template
        if not path.is_file():
            raise UserError(f"chat_template: there is no file '{path}'; relative paths start at the current folder.")
        digests["chat_template"] = file_digest(path)
    return digests


def architecture(config: ModelConfig, base: Path) -> Architecture:
    """Return the model's sizes from a ``config.json`` on this machine; raise ``UnknownArchitecture`` without one."""
    from align.models.known import known_architecture

    return known_architecture(config.source, config.revision, base)


def run(context: StageContext) -> dict[str, Any]:
    """Fetch, convert and write ``model/``; return parameters, vocabulary and the special tokens."""
    config: ModelConfig = context.config
    source = resolve(config.source, config.revision, Path.cwd())
    out_dir = context.output / "model"
    try:
        _write(context, source, out_dir)
    except (OSError, ValueError) as error:
        if source.origin is Origin.HUB:
            raise UserError(_explain_hub(source, error)) from error
        raise
    return _describe(out_dir)


def _write(context: StageContext, source: Source, out_dir: Path) -> None:
    config: ModelConfig = context.config
    template = Path(config.chat_template).read_text(encoding="utf-8") if config.chat_template else None
    name = str(source.path or source.name)
    if source.origin is Origin.TINY:
        from align.models.tiny import make_tiny

        name = str(make_tiny(context.checkpoints / "tiny", context.seed))
    elif source.origin is Origin.EMBEDDED:
        from align.models.embedded import fetch

        name = str(fetch(print))
    elif source.origin is Origin.GGUF:
        from align.models.conversion import convert_gguf

        # GGUF is converted straight into the output; every other origin becomes a folder that is copied.
        assert source.path is not None
        convert_gguf(source.path, out_dir, (lambda _: template) if template else None, context.warn, config.dtype)
        return
    elif source.origin is Origin.HUB:
        name = _download(source)
    from align.models.conversion import copy_model

    copy_model(
        name,
        out_dir,
        trust_remote_code=config.trust_remote_code,
        chat_template=template,
        dtype=config.dtype,
        warn=context.warn,
    )


def _download(source: Source) -> str:
    """Download a Hub model's files at its commit, weights only as safetensors; return the local folder.

    Raises ``OSError`` for any failure of the network.
    """
    import httpx
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in sorted(READ_SUFFIXES)]
    try:
        folder = snapshot_download(source.name, revision=source.revision, allow_patterns=patterns)
    except httpx.HTTPError as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    check_folder(Path(folder))
    return folder


def _explain_hub(source: Source, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the Hub model '{source.name}' at {source.revision} could not be brought in: {first}\n"
        "Check the network, HF_HUB_OFFLINE, HF_TOKEN for a gated model, and that the commit exists; "
        "or download it elsewhere and give the folder as source."
    )


def _describe(out_dir: Path) -> dict[str, Any]:
    from align.models.loading import load_policy, load_tokenizer

    tokenizer = load_tokenizer(out_dir)
    model = load_policy(out_dir)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "architecture": type(model).__name__,
        "vocabulary": len(tokenizer),
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
    }
