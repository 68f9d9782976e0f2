"""Settings of the steps of a recipe. ``align.core`` maps each to the code it runs."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config, PrecisionSetting
from align.config.recipe.source_settings import KNOWN_DATASETS, FilesSource, HubSource
from align.config.user_paths import NameOrPath, UserPath
from align.config.validation import suggest, validate_plain

ComparedPart = Literal["prompt", "reply", "row"]
"""Part of a row that is compared with other rows'."""
PairStrategy = Literal["best_worst", "all", "best_random", "adjacent"]
"""Answers to a prompt that are compared with each other."""


class EvaluationSet(Config):
    """One evaluation set."""

    name: str = Field(min_length=1, max_length=100)
    """Name in the ledger. A known name (arc_challenge, arc_easy, gsm8k, ifbench, ifeval, mmlu, mt_bench, truthfulqa,
    xstest) needs only ``revision``."""
    files: list[UserPath] | None = Field(None, min_length=1)
    """Paths or globs of its files, relative to the recipe's folder, instead of the Hub."""
    dataset: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name on the Hub of a set that is not known by name."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of the dataset, 40 hexadecimal digits."""
    config: str | None = None
    """Configuration (subset) of the dataset, if it has several."""
    split: str | None = None
    """Split of the dataset; ``test`` by default, or a known name's usual split."""
    fields: list[str] | None = Field(None, min_length=1)
    """Fields that make up the question, joined by a line break; ``a.b`` is field b of a. By default the first one
    present of prompt, question, turns, instruction, problem, goal, query, text. The texts of a list are searched for
    one by one."""

    identified: ClassVar[frozenset[str]] = frozenset({"files"})

    @model_validator(mode="after")
    def _check_single_place(self) -> Self:
        if self.files is not None:
            ignored = [name for name in ("dataset", "revision", "config", "split") if getattr(self, name) is not None]
            if ignored:
                raise ValueError(
                    f"evaluation set '{self.name}' has files, so '{ignored[0]}' has no effect; drop one of them"
                )
        elif self.dataset is None and self.name not in KNOWN_DATASETS:
            raise ValueError(
                f"evaluation set '{self.name}': give its files, or its dataset and revision on the Hub; known by name "
                f"are {', '.join(KNOWN_DATASETS)}.{suggest(self.name, KNOWN_DATASETS)}"
            )
        elif self.revision is None:
            raise ValueError(
                f"evaluation set '{self.name}' needs `revision`, the commit of "
                f"{self.dataset or KNOWN_DATASETS[self.name]['dataset']} on the Hub (40 hexadecimal digits), or `files`"
            )
        return self

    def source(self) -> FilesSource | HubSource:
        """Return the source that its records are read from."""
        if self.files is not None:
            return FilesSource(type="files", paths=self.files)
        usual = KNOWN_DATASETS.get(self.name, {}) if self.dataset is None else {"dataset": self.dataset}
        # The usual values of a known name, overridden by what the recipe states.
        settings = {"type": "hub", "split": "test", **usual}
        for name in ("config", "split", "revision"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        return validate_plain(HubSource, settings)


class NormalizeStep(Config):
    """Bring texts and turns into one form."""

    type: Literal["normalize"]
    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode form. NFKC also replaces full-width letters, ligatures, superscripts and the like by plain ones, in code
    too: x² becomes x2."""
    fix_encoding: bool = False
    """Repair wrongly decoded text (cafÃ© for café) with ftfy."""
    control: bool = True
    """Remove control characters, terminal escapes, zero-width and bidirectional-override characters; every kind of line
    end becomes a line feed."""
    whitespace: bool = True
    """Remove blanks at line ends, blank lines at both ends of a text, and those beyond ``blank_lines``; not in code."""
    blank_lines: int = Field(2, ge=1)
    """Largest number of blank lines in a row."""
    turns: bool = True
    """Put system turns first as one, merge turns of one role in a row, and remove empty turns at the end of a prompt.
    Dropped: rows that still have an empty turn or reply, whose first or last turn is not the user's, or whose two
    replies have become the same."""


class DivideStep(Config):
    """Divide every text into pieces; each piece becomes a row."""

    type: Literal["divide"]
    characters: int = Field(ge=100)
    """Largest length of a piece, in characters."""


class PairsStep(Config):
    """Make pairs of a row's ``responses``, and drop pairs without a preference.

    A row that is a pair already stays as it is, unless its scores tie or differ by less than ``margin``. In unpaired
    data an answer is labeled good if it is better in all its pairs, and bad if it is worse in all of them.
    """

    type: Literal["pairs"]
    how: PairStrategy = "best_worst"
    """Answers to compare: the best with the worst, the best with a random lower answer, all of them (K answers make
    K(K-1)/2 pairs, which gives prompts with many answers more weight), or each answer with the next in order."""
    margin: float = Field(0.0, ge=0)
    """Smallest difference in score, or in places of a ranking, that makes a pair; ties never do."""
    max_per_prompt: int | None = Field(None, ge=1)
    """Largest number of pairs from one row; the ones with the widest margins stay."""


class Keep(Config):
    """Scores of rows to keep. Quantiles are of all rows, or of each source's with ``per_source``."""

    above: float | None = None
    """Keep scores of at least this."""
    below: float | None = None
    """Keep scores of at most this."""
    quantiles: tuple[float, float] | None = Field(None, strict=False)
    """Keep scores between two quantiles: [0.5, 1] is the better half, [0.1, 0.9] drops both tails."""
    per_source: bool = False
    """Compute quantiles within each source, so no source is lost because its scores have another scale."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.quantiles is not None and not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError(f"keep.quantiles are {list(self.quantiles)}; expected two shares like [0.5, 1]")
        if self.above is not None and self.below is not None and self.above > self.below:
            raise ValueError(f"keep.above ({self.above}) is more than keep.below ({self.below}), so nothing is kept")
        return self


class ScoreStep(Config):
    """Score every row, and keep rows by their score."""

    type: Literal["score"]
    by: Literal["reward", "perplexity", "ifd", "function"]
    """The score: a reward model's, the perplexity of the reply, its instruction-following difficulty, or a function's
    value."""
    model: NameOrPath | None = None
    """Folder of the checkpoint that scores (``model/`` of a finished stage, or any transformers folder), or ``input 0``
    for an input of the data stage."""
    function: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    """``package.module:function``: accepts a list of rows and returns a number for each."""
    keep: Keep = Keep()
    """Rows to keep; all by default."""
    max_length: int = Field(1024, ge=8)
    """Tokens of prompt and reply that a model reads; a longer row is scored by its beginning."""
    batch_size: int = Field(16, ge=1)
    """Rows of one forward pass."""
    precision: PrecisionSetting = "auto"
    """Type of the matrix products; ``auto`` measures which one this device multiplies faster in."""

    @model_validator(mode="after")
    def _check_single_scorer(self) -> Self:
        if self.by == "function" and (self.function is None or self.model is not None):
            raise ValueError("score by function needs `function: package.module:name`, and no model")
        if self.by != "function" and (self.model is None or self.function is not None):
            raise ValueError(f"score by {self.by} needs `model:`, the folder of a checkpoint, and no function")
        return self


class ExactDuplicatesStep(Config):
    """Drop every row whose text equals an earlier row's text."""

    type: Literal["exact_duplicates"]
    of: ComparedPart = "row"
    """Part that must be equal: ``prompt`` (every turn of it), ``reply``, or ``row`` (both; a row is no duplicate of one
    with chosen and rejected exchanged)."""


class NearDuplicatesStep(Config):
    """Drop every row that pairs of similar rows connect with an earlier one."""

    type: Literal["near_duplicates"]
    of: ComparedPart = "row"
    """Part that is compared: ``prompt`` (all turns but system ones), ``reply``, or ``row`` (both)."""
    threshold: float = Field(0.7, gt=0, le=1)
    """Jaccard similarity of the sets of shingles from which two rows count as similar."""
    shingle: int | None = Field(None, ge=1, le=50)
    """Words in a shingle; 3 for prompts, 5 otherwise. One changed word changes as many shingles, so larger shingles
    find only equal texts if texts have a dozen words."""
    permutations: int = Field(128, ge=16, le=1024)
    """Bytes of a signature. More of them leave fewer pairs whose words must be compared."""
    recall: float = Field(0.95, gt=0, lt=1)
    """Least probability that a pair exactly at the threshold is compared; nearer 1 compares more pairs."""


class SemanticDuplicatesStep(Config):
    """Drop every row whose embedding is close to the embedding of an earlier row that stays."""

    type: Literal["semantic_duplicates"]
    model: NameOrPath
    """Folder of the embedding model, or its owner and name on the Hub with ``revision``. Static embeddings (model2vec,
    like minishlab/potion-base-8M) are fast; a transformers model (all-MiniLM-L6-v2, or your own) embeds a text as its
    mean hidden state."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of the model on the Hub, 40 hexadecimal digits."""
    of: ComparedPart = "prompt"
    """Part that is compared: ``prompt`` (all turns but system ones), ``reply``, or ``row`` (both)."""
    threshold: float = Field(0.9, gt=0, le=1)
    """Cosine from which two texts mean the same; the right value depends on the model."""
    max_length: int = Field(256, ge=8)
    """Tokens of a text that are read; a longer one is compared by its beginning."""
    batch_size: int = Field(64, ge=1)
    """Texts of one forward pass of a transformers model."""

    identified: ClassVar[frozenset[str]] = frozenset({"model"})

    @model_validator(mode="after")
    def _check_pinned(self) -> Self:
        # A Hub name has one slash; a path has none, several, or begins like one.
        is_folder = "/" not in self.model or self.model.startswith((".", "/", "~")) or self.model.count("/") > 1
        if self.revision is not None and is_folder:
            raise ValueError(f"model '{self.model}' is a folder, pinned by its contents; leave `revision` out")
        return self


class DecontaminateStep(Config):
    """Drop, or report, every row that contains an item of an evaluation set."""

    type: Literal["decontaminate"]
    sets: list[EvaluationSet] = Field(min_length=1)
    """Evaluation sets that the rows must not contain."""
    ngram: int = Field(8, ge=2, le=50)
    """Words in an n-gram. Tülu 3 and open-r1 use 8, datatrove 12, lm-eval 13. Items with a few changed words are also
    found by shorter n-grams."""
    coverage: float = Field(0.5, ge=0, lt=1)
    """An item is contained if more than this share of its words is in shared n-grams; at 0 any shared n-gram is a
    hit."""
    template: float = Field(0.1, gt=0, le=1)
    """An n-gram in more than this share of a set's items, and in more than ten of them, belongs to the set's template
    (``Answer format: answer1/answer2``): it is no evidence, and its words do not count. At 1 there are no templates, as
    in Tülu 3."""
    of: Literal["user", "all"] = "all"
    """Part of a row that is searched: ``all`` of it, replies included, or only its ``user`` turns, as Tülu 3 does."""
    action: Literal["drop", "report"] = "drop"
    """``report`` keeps the rows and lists the hits in the ledger."""

    @model_validator(mode="after")
    def _check_unique_names(self) -> Self:
        names = [evaluation_set.name for evaluation_set in self.sets]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"two evaluation sets are named '{repeated}'; hits could not be told apart. Rename one")
        return self


class CapStep(Config):
    """Keep a limited number of rows of each source."""

    type: Literal["cap"]
    each: int | None = Field(None, ge=1)
    """Rows of every source that ``sources`` does not name."""
    sources: dict[str, int] = Field({})
    """Rows of single sources, by name: ``{dolly: 2000}``."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.each is None and not self.sources:
            raise ValueError("cap needs `each` (rows of every source) or `sources` (rows by name)")
        if low := [name for name, rows in self.sources.items() if rows < 1]:
            raise ValueError(f"cap.sources: '{low[0]}' is capped at {self.sources[low[0]]} rows; remove the source")
        return self


class MixStep(Config):
    """Sets each source's share of the training rows by ``weights``, ``temperature`` or ``epochs``."""

    type: Literal["mix"]
    weights: dict[str, float] | None = None
    """Share of the rows by source; sources that are not named get none. They need not sum to 1."""
    temperature: float | None = Field(None, gt=0)
    """Shares proportional to size ** (1 / temperature): 1 leaves them unchanged, a large value makes them equal (arXiv
    1910.10683, 3.5.2)."""
    epochs: dict[str, float] | None = None
    """Times that each row of a source appears; 1.5 repeats half of the rows; 1 for sources not named."""
    rows: int | None = Field(None, ge=1)
    """Training rows of the mixture, with weights and temperature; by default as many as before."""
    max_epochs: float = Field(4, ge=1)
    """Largest number of times that a row appears, with weights and temperature. If it binds, the mixture is smaller and
    the ledger reports it. Beyond four, repeats are worth less than fresh rows (arXiv 2305.16264)."""

    @model_validator(mode="after")
    def _check_single_rule(self) -> Self:
        # Three ways to say the same thing, which would contradict each other.
        rules = [name for name in ("weights", "temperature", "epochs") if getattr(self, name) is not None]
        if len(rules) != 1:
            raise ValueError(f"mix needs one of weights, temperature and epochs; {' and '.join(rules) or 'none'} given")
        if self.epochs is not None and self.rows is not None:
            raise ValueError("mix.rows goes with weights or temperature; epochs already say how many rows there are")
        for name, value in {**(self.weights or {}), **(self.epochs or {})}.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"mix.{rules[0]}.{name} is {value}; expected a number of at least 0")
        # Weights are shares, so at least one must be positive.
        if self.weights is not None and not sum(self.weights.values()):
            raise ValueError("mix.weights are all 0; one at least must be more")
        return self
