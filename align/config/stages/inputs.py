"""Settings of the stages that bring models, artifacts and data into the store. Torch-free."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config, stage_input
from align.config.chat_template import TEMPLATE_FIELDS, TemplateVariables, Thinking
from align.config.recipe.source_settings import RecordSource, parse_split
from align.config.user_paths import NameOrPath, PathField, UserPath
from align.store.artifacts import DATASETS, Kind

BUILT_IN = ("smollm2-135m-instruct", "tiny")
"""Names of the models that are always there (``align.models.checkpoints.source``)."""


class ModelConfig(Config):
    """The base model and its files."""

    source: Annotated[str, PathField(may_be_name=True, names=BUILT_IN)]
    """A built-in model (smollm2-135m-instruct, tiny), a model folder, a peft adapter's folder, a .gguf file, or the Hub
    name of a model or adapter."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, by default main. The plan shows the commit that it means, and the record
    keeps it; write that commit here for a pipeline that always means the same model."""
    base_model: Annotated[str, PathField(may_be_name=True, names=BUILT_IN)] | None = None
    """For an adapter: its base, in any form of ``source`` but a .gguf file. The default is the base that the adapter
    names."""
    base_revision: str | None = None
    """Branch, tag or commit of the adapter's base on the Hub."""
    trust_remote_code: bool = False
    """Run Python code of the model's repository; otherwise such a model is refused."""
    chat_template: NameOrPath | None = None
    """Chat template, which replaces the model's: a template that ships with align, by name (alpaca, chatml,
    chatml-tools, gemma, llama2, llama3, mistral, phi3, qwen2.5, tulu, vicuna, zephyr), or the path of a Jinja file.
    Required for a base model without one."""
    thinking: Thinking = None
    """``on`` or ``off`` sets the thinking switch of a chat template that has one (Qwen3, SmolLM3, GLM, DeepSeek V3.1),
    for this stage's checkpoint and all later ones (docs/thinking.md). By default the template decides."""
    chat_template_kwargs: TemplateVariables = Field({})
    """Variables of the chat template, such as ``{reasoning_effort: low}``, stored in the checkpoint as ``thinking``
    is. A variable that the template does not read is refused."""
    add_tokens: list[str] = Field([])
    """Special tokens to add to the vocabulary, such as the chat template's: ``["<|im_start|>", "<|im_end|>"]``. Their
    embeddings start as the mean of all others; ``train_tokens`` of LoRA trains them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the stored weights: by default bfloat16 if all of the source's are, else float32. Checkpoints that are
    trained by adapters keep the type. Weights that are trained in full become float32."""

    identified: ClassVar[frozenset[str]] = frozenset(
        {"source", "revision", "base_model", "base_revision", "chat_template", "add_tokens"}
    )
    keyed_when_set: ClassVar[frozenset[str]] = TEMPLATE_FIELDS

    @field_validator("add_tokens")
    @classmethod
    def _check_tokens(cls, tokens: list[str]) -> list[str]:
        for token in tokens:
            if not token or token != token.strip():
                raise ValueError(f"{token!r} is not a token; write it without spaces around it.")
        if len(set(tokens)) < len(tokens):
            raise ValueError("a token is listed twice.")
        return tokens


class ArtifactConfig(Config):
    """The artifact's folder."""

    path: UserPath
    """Folder of a finished artifact (with its record.json), or a reward model's folder (safetensors)."""

    identified: ClassVar[frozenset[str]] = frozenset({"path"})


class DataConfig(RecordSource):
    """A recipe and its files, or a dataset in one line: ``{dataset: owner/name, split: "train[:5000]"}``.

    The fields of a recipe's source (``format``, ``options`` and so on) belong to ``dataset``.
    """

    recipe: UserPath | None = None
    """Path of a recipe (data_recipes/*.yaml), which starts at the pipeline's folder; its content enters the key."""
    files: list[UserPath] | None = Field(None, min_length=1)
    """Local files (paths or globs) in the recipe's format, to read instead of its sources."""

    dataset: NameOrPath | None = None
    """Instead of a recipe: a file, folder or glob, or a dataset of the Hub (owner/name). Its format and kind are
    guessed from its columns; ``align plan --resolved`` prints the recipe that it stands for."""
    name: str | None = Field(None, min_length=1, max_length=200)
    """Configuration (subset) of the Hub dataset, if it has several."""
    split: str | None = None
    """Split of the Hub dataset, by default train, with slices: ``train[:5000]``, ``train[10%:20%]``, ``train+test``."""
    test_split: str | None = None
    """Split of the Hub dataset to hold out for testing, instead of a share of ``split``."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset, by default main. The plan shows the commit that it means."""
    kind: Literal["instructions", "preferences", "prompts", "unpaired", "texts"] | None = None
    """Contents of a row, as in a recipe; guessed from the columns by default."""
    test_size: float | None = Field(None, ge=0, le=1)
    """Share of the prompts held out for testing; 0.1 by default. 1.0 leaves no rows to train on, 0 no rows to test
    on."""

    inputs: list[stage_input(*DATASETS, Kind.POLICY, Kind.REWARD)] = Field([])  # type: ignore[valid-type]
    """Earlier stages with data for the recipe's sources of type ``input``, or with models for its steps."""
    max_rows: int | None = Field(None, ge=2)
    """Most rows, both splits together; overrides the recipe's."""

    # All of them are in the recipe, whose digest is an identity.
    identified: ClassVar[frozenset[str]] = frozenset(
        {
            *RecordSource.model_fields,
            *("recipe", "files", "max_rows", "dataset", "name", "split", "test_split", "revision", "kind", "test_size"),
        }
    )

    def _may_read_files(self) -> bool:
        # ``dataset`` is checked when its source is made, like a recipe's source.
        return True

    @field_validator("split", "test_split")
    @classmethod
    def _check_split(cls, split: str | None) -> str | None:
        if split is not None:
            parse_split(split)
        return split

    @model_validator(mode="after")
    def _check_recipe_or_dataset(self) -> Self:
        if (self.recipe is None) == (self.dataset is None):
            raise ValueError("a data stage has a recipe or a dataset; write one of them")
        if self.dataset is not None and self.files is not None:
            raise ValueError("files replace the sources of a recipe; name them as dataset")
        if self.test_split is not None and self.test_size is not None:
            raise ValueError("test_split and test_size both say what is held out for testing; drop one of them")
        if self.test_split is not None and self.part != "split":
            raise ValueError("test_split decides the part of each row, so part has no effect; drop one of them")
        if self.recipe is not None:
            changed = self.changed(
                *RecordSource.model_fields, *("split", "test_split", "revision", "kind", "test_size")
            )
            if changed:
                raise ValueError(f"{changed[0]} belongs to dataset; with a recipe, write it there")
        return self
