"""Check a model stage while its pipeline is planned: the chat template and the sizes of the model. Torch-free.

A base model without a template, and a template whose tokens the vocabulary lacks, would otherwise show after a download
of gigabytes. What is not on this machine and cannot be fetched is not checked here; the stage itself checks everything.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.hub_commits import small_file
from align.config.stages.inputs import ModelConfig
from align.config.validation import suggest
from align.errors import UserError
from align.models.built_in import EMBEDDED_TOKENS, MAX_POSITIONS, SPECIAL_TOKENS
from align.models.chat.named_templates import (
    explain_no_template,
    has_template,
    read_vocabulary,
    require_tokens,
    template_file,
)
from align.models.checkpoints.files import CONFIG, read_header, read_optional, refuse_quantized
from align.models.checkpoints.folder_checks import SETTINGS, TEMPLATE, TOKENIZER
from align.models.checkpoints.source import Origin, Source, resolve
from align.models.compute.architecture import TIED, Architecture, UnknownArchitecture
from align.models.compute.model_types import architecture_of, read_architecture

NEAR = 0.75
"""Likeness of a name to a module's, from 0 to 1, from which it is taken for a misspelling."""


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts of a tokenizer's files."""

    has_template: bool
    read_vocabulary: Callable[[], frozenset[str]]
    """Function that returns its tokens, at least the special ones; empty if they are not known."""


def check_template(config: ModelConfig, base: Path) -> None:
    """Raise ``UserError`` if a model has no chat template, or lacks the tokens of a named template."""
    if config.chat_template is not None:
        template_file(config.chat_template, base)
    tokenizers = list(_known_tokenizers(config, base))
    if not tokenizers:
        return
    if config.chat_template is None:
        # An adapter's own tokenizer counts, with the base's template if it has none.
        if not any(tokenizer.has_template for tokenizer in tokenizers):
            vocabulary = tokenizers[0].read_vocabulary() | set(config.add_tokens)
            raise UserError(f"source: {explain_no_template(config.source, vocabulary)}")
        return
    vocabulary = tokenizers[0].read_vocabulary()
    if vocabulary:
        place = f"the vocabulary of '{config.source}'"
        require_tokens(config.chat_template, vocabulary | set(config.add_tokens), place)


def check_unquantized(config: ModelConfig, base: Path) -> None:
    """Raise ``UserError`` if the weights of a model stage's source, or of an adapter's base, are quantized."""
    for name, revision in ((config.source, config.revision), (config.base_model, config.base_revision)):
        file = None if name is None else _known_config(resolve(name, revision, base))
        if file is not None:
            refuse_quantized(file, read_optional(file))


def known_vocabulary(config: ModelConfig, base: Path) -> frozenset[str]:
    """Return the tokens of a model stage's tokenizer, at least the special ones; empty if they are not known."""
    tokens: frozenset[str] = frozenset(config.add_tokens)
    for tokenizer in _known_tokenizers(config, base):
        return tokens | tokenizer.read_vocabulary()
    return tokens


def _known_tokenizers(config: ModelConfig, base: Path) -> Iterator[TokenizerFacts]:
    """Yield facts of the tokenizers of the source and of its base, in the order of use."""
    sources = [resolve(config.source, config.revision, base)]
    if config.base_model is not None:
        sources.append(resolve(config.base_model, config.base_revision, base))
    for source in sources:
        facts = _tokenizer_facts(source)
        if facts is not None:
            yield facts


def _tokenizer_facts(source: Source) -> TokenizerFacts | None:
    """Return facts of a source's tokenizer; None if its files are not known, or there are none."""
    if source.origin is Origin.TINY:
        return TokenizerFacts(True, lambda: frozenset(SPECIAL_TOKENS))
    if source.origin is Origin.EMBEDDED:
        return TokenizerFacts(True, lambda: frozenset(EMBEDDED_TOKENS))
    if source.origin in (Origin.FOLDER, Origin.ADAPTER):
        assert source.path is not None
        tokenizer = source.path / TOKENIZER
        if not (source.path / SETTINGS).is_file():
            return None
        return TokenizerFacts(has_template(source.path), lambda: read_vocabulary(tokenizer))
    if source.origin is Origin.HUB:
        return _hub_facts(source)
    return None


def _hub_facts(source: Source) -> TokenizerFacts | None:
    commit = source.revision
    assert commit is not None
    settings = small_file(source.name, commit, SETTINGS)
    if settings is None:
        return None
    # Fetch the template into the folder of the settings, where has_template looks for it.
    small_file(source.name, commit, TEMPLATE)

    def fetch_vocabulary() -> frozenset[str]:
        tokenizer = small_file(source.name, commit, TOKENIZER)
        return frozenset() if tokenizer is None else read_vocabulary(tokenizer)

    return TokenizerFacts(has_template(settings.parent), fetch_vocabulary)


SIZES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("built_in.json").read_text(encoding="utf-8"))
EMBEDDED_SIZES = SIZES["embedded"]
"""Sizes of SmolLM2-135M, known before it is fetched."""
TINY_SIZES = SIZES["tiny"]
"""Sizes of ``make_tiny``'s default model."""


def known_architecture(source: str, revision: str | None, base: Path) -> Architecture:
    """Return the architecture of a model stage's ``source``.

    Raises ``UnknownArchitecture``, which names the command that makes it known.
    """
    origin = resolve(source, revision, base)
    if origin.origin is Origin.EMBEDDED:
        return architecture_of(EMBEDDED_SIZES)
    if origin.origin is Origin.TINY:
        return architecture_of(TINY_SIZES)
    if origin.origin is Origin.FOLDER and origin.path is not None:
        return read_architecture(origin.path / "config.json")
    if origin.origin is Origin.ADAPTER:
        raise UnknownArchitecture(f"'{source}' is an adapter; its base has the sizes")
    if origin.origin is Origin.GGUF:
        raise UnknownArchitecture(f"'{source}' has no config.json before its model stage has run")
    return read_architecture(_cached(origin))


def known_parameters(source: str, revision: str | None, base: Path) -> int:
    """Return the number of parameters of a model stage's ``source``.

    A model without a rule for its architecture is counted by the headers of its files. Raises ``UnknownArchitecture``.
    """
    try:
        return known_architecture(source, revision, base).parameters
    except UnknownArchitecture as error:
        origin = resolve(source, revision, base)
        tensors: Iterable[int] = ()
        if origin.origin is Origin.GGUF and origin.path is not None:
            from gguf import GGUFReader

            tensors = (int(tensor.n_elements) for tensor in GGUFReader(origin.path).tensors)
        elif origin.path is not None:
            headers = (read_header(file) for file in origin.path.glob("*.safetensors"))
            tensors = (math.prod(entry.shape) for header in headers for entry in header.values())
        elif origin.origin is Origin.HUB:
            tensors = _hub_counts(origin)
        count = sum(tensors)
        if not count:
            raise error
        return count


def _hub_counts(source: Source) -> list[int]:
    """Return the numbers of parameters by type, from the headers of a Hub model's files; empty if it has none."""
    import httpx
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    if small_file(source.name, str(source.revision), CONFIG) is None:  # also if the Hub does not answer
        return []
    try:
        return list(get_safetensors_metadata(source.name, revision=source.revision).parameter_count.values())
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, httpx.HTTPError, OSError):
        return []


def check_targets(
    config: ModelConfig, base: Path, names: Sequence[str], place: str, *, is_matrix: bool, has_head: bool
) -> None:
    """Raise ``UserError``, which begins with ``place``, for names that fit no module of a model stage's ``source``.

    ``is_matrix``: they can only be matrices, which get adapters. Other modules, and models with experts or states, have
    more names than the rules for an architecture know: there only a name that is nearly a known name is refused.
    ``has_head``: the stage trains a language model, so an adapter on a tied head is refused as well.
    """
    source = config.base_model or config.source
    revision = config.revision if config.base_model is None else config.base_revision
    try:
        architecture = known_architecture(source, revision, base)
    except UnknownArchitecture:
        return
    known = architecture.module_names
    is_complete = is_matrix and not architecture.experts and not architecture.state
    for name in names:
        last = name.rpartition(".")[2]
        is_near = bool(difflib.get_close_matches(last, known, cutoff=NEAR))
        if (is_near or is_complete) and not architecture.has_module(name):
            raise UserError(f"{place}: '{name}' fits no module of '{source}'.{suggest(last, known)}")
        if is_matrix and has_head and architecture.is_tied(name):
            raise UserError(f"{place}: {TIED}")


def known_positions(source: str, revision: str | None, base: Path) -> int | None:
    """Return the longest sequence, in tokens, of a model stage's ``source``; None if this machine does not know it."""
    origin = resolve(source, revision, base)
    if origin.origin is Origin.TINY:
        return MAX_POSITIONS
    config = _known_config(origin)
    if config is None:
        return None
    settings = read_optional(config)
    settings |= settings.get("text_config") or {}
    limit = settings.get("max_position_embeddings") or settings.get("n_positions")
    return limit if isinstance(limit, int) and limit > 0 else None


def _known_config(source: Source) -> Path | None:
    """Return the ``config.json`` of a folder or of a Hub model; None if this machine does not have it."""
    if source.origin is Origin.FOLDER and source.path is not None:
        return source.path / CONFIG
    return small_file(source.name, str(source.revision), CONFIG) if source.origin is Origin.HUB else None


def _cached(source: Source) -> Path:
    """Return a Hub model's ``config.json``, from the cache or fetched into it."""
    path = small_file(source.name, str(source.revision), CONFIG)
    if path is None:
        raise UnknownArchitecture(
            f"the config.json of '{source.name}' is not on this machine; "
            f"`hf download {source.name} config.json --revision {source.revision}` fetches only this file"
        )
    return path
