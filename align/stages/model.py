"""Stage ``model``: bring a base model into the store as safetensors with a checked tokenizer."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.hub_commits import small_file
from align.config.stages.inputs import ModelConfig
from align.errors import UserError
from align.models.chat.named_templates import read_template, template_file
from align.models.chat.template_settings import TemplateSettings, stored_settings
from align.models.checkpoints.conversion import read_base
from align.models.checkpoints.files import ADAPTER_CONFIG, CONFIG, READ_SUFFIXES, is_adapter
from align.models.checkpoints.folder_checks import check_adapter, check_folder
from align.models.checkpoints.source import Origin, Source, identity, resolve
from align.models.model_plan import check_template, check_unquantized
from align.models.planned_template import check_settings, explain_replacement
from align.pipeline.context import StageContext
from align.store.fingerprint import digest, file_digest

if TYPE_CHECKING:
    from align.models.compute.architecture import Architecture


PARTS = 4
"""Parts of the work: load the libraries, fetch, write, read back."""


def pinned(config: ModelConfig, base: Path) -> ModelConfig:
    """Return the config with the commits of Hub names, and with an adapter's base.

    Raises ``UserError`` for a missing source, for an adapter whose base is unknown or missing, for quantized weights,
    for a model that will have no chat template, for a chat template whose tokens the model lacks, and for a setting
    that it does not read.
    """
    source = resolve(config.source, config.revision, base)
    changes: dict[str, Any] = {"revision": source.revision} if source.origin is Origin.HUB else {}
    settings = _adapter_config(source)
    if settings is not None:
        changes |= _pinned_base(config, settings, base)
    elif (config.base_model or config.base_revision) and _is_whole(source):
        _refuse_base(config)
    changes = {name: value for name, value in changes.items() if getattr(config, name) != value}
    config = config.model_copy(update=changes) if changes else config
    check_unquantized(config, base)
    check_template(config, base)
    check_settings(config, base)
    return config


def plan_warnings(config: ModelConfig, base: Path) -> list[str]:
    """Return a plan's warnings: the chat template that replaces the tokenizer's own."""
    replacement = explain_replacement(config, base)
    return [] if replacement is None else [replacement]


def _adapter_config(source: Source) -> Path | None:
    """Return the ``adapter_config.json`` of a source that is an adapter; None for any other source.

    A Hub name without files on this machine also gives None: the download shows if it is an adapter.
    """
    if source.origin is Origin.ADAPTER and source.path is not None:
        return source.path / ADAPTER_CONFIG
    if source.origin is not Origin.HUB or source.revision is None:
        return None
    # A model has a config.json. An adapter has none.
    if small_file(source.name, source.revision, CONFIG) is not None:
        return None
    return small_file(source.name, source.revision, ADAPTER_CONFIG)


def _is_whole(source: Source) -> bool:
    """Return True for a source that is known to be a full model."""
    if source.origin is not Origin.HUB:
        return source.origin is not Origin.ADAPTER
    if source.revision is None or small_file(source.name, source.revision, CONFIG) is None:
        return False
    # Some adapters come with a copy of their base's config.
    return small_file(source.name, source.revision, ADAPTER_CONFIG) is None


def _refuse_base(config: ModelConfig) -> None:
    """Raise ``UserError`` if a model that is not an adapter has a base."""
    for name in ("base_model", "base_revision"):
        if getattr(config, name) is not None:
            raise UserError(f"{name}: '{config.source}' is a full model, not an adapter; remove {name}.")


def _pinned_base(config: ModelConfig, settings: Path, base: Path) -> dict[str, Any]:
    base_of_adapter = read_base(settings)
    name = config.base_model
    revision = config.base_revision
    if name is None:
        # The adapter's revision belongs to the base that it names, and not to a base that the user names.
        if base_of_adapter is None:
            raise UserError(f"base_model: {settings} names no base; write it here.")
        name = base_of_adapter.name
        revision = revision or base_of_adapter.revision
    try:
        source = resolve(name, revision, base)
    except UserError as error:
        text = str(error).removeprefix("source: ").removeprefix("revision: ")
        origin = "" if config.base_model else f" ({settings} names this base; another place of it goes into base_model)"
        raise UserError(f"base_model: {text}{origin}") from None
    if source.origin in (Origin.GGUF, Origin.ADAPTER):
        raise UserError(
            f"base_model: '{name}' is {'an adapter' if source.origin is Origin.ADAPTER else 'a .gguf file'}; an "
            "adapter is merged into a model folder. Import the base in a separate model stage, and name the "
            "folder `model` of its artifact."
        )
    return {"base_model": name, "base_revision": source.revision}


def identities(config: ModelConfig, base: Path) -> dict[str, str]:
    """Return the commits or digests of model and base, and digests of the chat template and the added tokens."""
    digests = {"source": identity(config.source, config.revision, base)}
    if config.base_model is not None:
        digests["base_model"] = identity(config.base_model, config.base_revision, base)
    if config.chat_template is not None:
        digests["chat_template"] = file_digest(template_file(config.chat_template, base))
    if config.add_tokens:
        digests["add_tokens"] = digest(config.add_tokens)
    return digests


def architecture(config: ModelConfig, base: Path) -> Architecture:
    """Return the model's sizes from a ``config.json`` on this machine; raise ``UnknownArchitecture`` without one."""
    from align.models.model_plan import known_architecture

    # An adapter has the sizes of its base.
    if config.base_model is not None:
        return known_architecture(config.base_model, config.base_revision, base)
    return known_architecture(config.source, config.revision, base)


def parameters(config: ModelConfig, base: Path) -> int:
    """Return the model's number of parameters, only from files; raise ``UnknownArchitecture`` if it is not known."""
    from align.models.model_plan import known_parameters

    if config.base_model is not None:
        return known_parameters(config.base_model, config.base_revision, base)
    return known_parameters(config.source, config.revision, base)


def run(context: StageContext) -> dict[str, Any]:
    """Fetch, convert and write ``model/``; return parameters, vocabulary and the special tokens."""
    # Report progress before the first import, because importing torch from a cold disk can need a minute.
    context.progress(0, PARTS, unit="parts", step="loading torch and transformers")
    from align.models.checkpoints.conversion import Changes, convert_gguf, copy_model, merge_adapter

    config: ModelConfig = context.config
    for text in plan_warnings(config, Path.cwd()):
        context.warn(text)
    source = resolve(config.source, config.revision, Path.cwd())
    template = None if config.chat_template is None else read_template(config.chat_template, Path.cwd())
    changes = Changes(
        chat_template=None if template is None else lambda _: template,
        template_name=config.chat_template or "",
        template_settings=TemplateSettings.of(config),
        add_tokens=tuple(config.add_tokens),
        dtype=config.dtype,
    )
    out_dir = context.output / "model"
    if source.origin is Origin.GGUF:
        # GGUF is converted straight into the output; every other origin becomes a folder that is copied.
        assert source.path is not None
        context.progress(2, PARTS, unit="parts", step=f"dequantizing {source.path.name}")
        convert_gguf(source.path, out_dir, changes, context.warn)
        return _describe(out_dir, context)
    context.progress(1, PARTS, unit="parts", step=f"fetching {config.source}")
    folder = _fetch(source, context)
    context.progress(2, PARTS, unit="parts", step="writing weights and tokenizer")
    if is_adapter(folder):
        base = _fetch_base(folder, context)
        merge_adapter(base, folder, out_dir, changes, context.warn, trust_remote_code=config.trust_remote_code)
    else:
        _refuse_base(config)  # again: the plan may not have known the files of a Hub name
        with _text_part(folder, context) as text_folder:
            copy_model(text_folder, out_dir, changes, context.warn, trust_remote_code=config.trust_remote_code)
    return _describe(out_dir, context)


@contextlib.contextmanager
def _text_part(folder: Path, context: StageContext) -> Iterator[Path]:
    """Yield the folder of a plain model, or of the text part of a multimodal model, whose other parts are kept."""
    from align.models.checkpoints import multimodal

    check_folder(folder)
    # The code that comes with a model may read other files.
    if context.config.trust_remote_code or not multimodal.is_multimodal(folder):
        yield folder
        return
    text = context.output / "text"
    rest = context.output / multimodal.FOLDER
    for part in (text, rest):
        shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
    multimodal.split(folder, text, rest)
    context.note("trains the text part of a multimodal model; `align export` puts the other parts back")
    yield text
    shutil.rmtree(text)


def _fetch(source: Source, context: StageContext) -> Path:
    """Return the folder of a source; create, download or convert it if it is not on this machine yet."""
    if source.origin is Origin.TINY:
        from align.models.built_in import make_tiny

        return make_tiny(context.checkpoints / "tiny", context.seed)
    if source.origin is Origin.EMBEDDED:
        from align.models.built_in import fetch

        return fetch(print)
    if source.origin is Origin.HUB:
        return _download(source)
    assert source.path is not None
    return source.path


def _fetch_base(adapter: Path, context: StageContext) -> Path:
    """Return the folder of the adapter's base, which the plan has pinned."""
    config: ModelConfig = context.config
    if config.base_model is None:
        base_of_adapter = read_base(adapter / ADAPTER_CONFIG)
        example = base_of_adapter.name if base_of_adapter else "NAME"
        raise UserError(
            f"source: '{config.source}' is an adapter, which the plan could not know without the Hub. Write its base: "
            f"`base_model: {example}`, and with a Hub name its commit as base_revision."
        )
    return _fetch(resolve(config.base_model, config.base_revision, Path.cwd()), context)


def _download(source: Source) -> Path:
    """Download a Hub model's files at its commit, weights only as safetensors; return the local folder.

    Raises ``UserError`` for any failure of the network, and for a folder that is damaged or hostile.
    """
    import httpx
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in sorted(READ_SUFFIXES)]
    try:
        folder = Path(snapshot_download(source.name, revision=source.revision, allow_patterns=patterns))
    except httpx.HTTPError as error:
        raise UserError(_explain_hub(source, f"{type(error).__name__}: {error}")) from error
    except (OSError, ValueError) as error:
        raise UserError(_explain_hub(source, str(error).strip() or type(error).__name__)) from error
    if is_adapter(folder):
        check_adapter(folder)
    else:
        check_folder(folder)
    return folder


def _explain_hub(source: Source, reason: str) -> str:
    return (
        f"the Hub model '{source.name}' at {source.revision} could not be brought in: {reason.splitlines()[0]}\n"
        "Check the network, HF_HUB_OFFLINE, HF_TOKEN for a gated model, and that the commit exists; "
        "or download it elsewhere and give the folder as source."
    )


def _describe(out_dir: Path, context: StageContext) -> dict[str, Any]:
    """Read the written folder back; return parameters, vocabulary and the special tokens."""
    context.progress(3, PARTS, unit="parts", step="reading them back")
    from align.models.loading import load_policy, load_tokenizer

    tokenizer = load_tokenizer(out_dir)
    model = load_policy(out_dir)
    context.progress(PARTS, PARTS, unit="parts")
    settings = stored_settings(tokenizer.chat_template)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "architecture": type(model).__name__,
        "vocabulary": len(tokenizer),
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        **({"chat_template_kwargs": json.dumps(settings)} if settings else {}),
    }
