"""Check the chat template of a model stage while its pipeline is planned, from the tokenizer's small files. Torch-free.

A base model without a template, and a template whose tokens the vocabulary lacks, would otherwise show after a download
of gigabytes. What is not on this machine and cannot be fetched is not checked here; the stage itself checks everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from align.config.hub_commits import small_file
from align.config.stages.model import ModelConfig
from align.errors import UserError
from align.models.embedded import SPECIAL_TOKENS as EMBEDDED_TOKENS
from align.models.named_templates import (
    explain_no_template,
    has_template,
    read_vocabulary,
    require_tokens,
    template_file,
)
from align.models.source import Origin, Source, resolve
from align.models.tiny import SPECIAL_TOKENS
from align.models.tokenizer_checks import SETTINGS, TEMPLATE, TOKENIZER


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts of a tokenizer's files."""

    has_template: bool
    read_vocabulary: Callable[[], frozenset[str]]
    """Function that returns its tokens, at least the special ones; empty where they are not known."""


def check_template(config: ModelConfig, base: Path) -> None:
    """Raise ``UserError`` for a model without a chat template, and for a named one whose tokens it lacks."""
    if config.chat_template is not None:
        template_file(config.chat_template, base)
    known = list(_known_tokenizers(config, base))
    if not known:
        return
    if config.chat_template is None:
        # An adapter's own tokenizer counts, with the base's template where it has none.
        if not any(tokenizer.has_template for tokenizer in known):
            vocabulary = known[0].read_vocabulary() | set(config.add_tokens)
            raise UserError(f"source: {explain_no_template(config.source, vocabulary)}")
        return
    vocabulary = known[0].read_vocabulary()
    if vocabulary:
        place = f"the vocabulary of '{config.source}'"
        require_tokens(config.chat_template, vocabulary | set(config.add_tokens), place)


def _known_tokenizers(config: ModelConfig, base: Path) -> Iterator[TokenizerFacts]:
    """Yield facts of the tokenizers of the source and of its base, the one that is used first."""
    sources = [resolve(config.source, config.revision, base)]
    if config.base_model is not None:
        sources.append(resolve(config.base_model, config.base_revision, base))
    for source in sources:
        facts = _tokenizer_facts(source)
        if facts is not None:
            yield facts


def _tokenizer_facts(source: Source) -> TokenizerFacts | None:
    """Return facts of a source's tokenizer; None where its files are not known, or there are none."""
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
    # Fetched into the folder of the settings, where has_template looks for it.
    small_file(source.name, commit, TEMPLATE)

    def fetch_vocabulary() -> frozenset[str]:
        tokenizer = small_file(source.name, commit, TOKENIZER)
        return frozenset() if tokenizer is None else read_vocabulary(tokenizer)

    return TokenizerFacts(has_template(settings.parent), fetch_vocabulary)
