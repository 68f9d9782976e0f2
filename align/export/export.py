"""Export a checkpoint as one plain transformers folder: adapter merged, safetensors, tokenizer, chat template.

peft merges the adapter in float32 into a base that is not used afterwards; then the weights are cast to their type on
disk. Excluded: comparing the folder's answers with the checkpoint's (``align.export.verify``), quantized weights, and
adapters that cannot be merged (prefix tuning, sequential bottlenecks, LLaMA-Adapter).
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.card import License
from align.data.push import Part, Upload, check_repo, hub_errors, make_repository
from align.errors import UserError
from align.export.thinking import serving_advice
from align.models.checkpoints.conversion import CLASSIFIER, tokenizer_folder
from align.models.checkpoints.files import ADAPTER_CONFIG
from align.models.checkpoints.folder_checks import check_adapter, check_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

STORED = Path("adapter", "adapter.json")
"""In a model folder, the description of an inserted adapter (``align.models.tuning.stored``)."""
SHARD = "5GB"
"""Largest file of weights; a larger model is split and gets an index."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Files that decide which safetensors a loader reads: shards of an earlier push, an adapter that is now merged."""
INT8_LARGEST = 127.0
FLOAT8_LARGEST = 448.0
"""Largest number of float8 (e4m3)."""


@dataclass(frozen=True)
class Source:
    """A model folder to export, and an adapter's folder to merge into it, if any."""

    folder: Path
    adapter: Path | None = None

    def is_reward(self) -> bool:
        """Return True for a sequence classifier, which scores and does not generate."""
        if self.adapter is not None:
            return str(read_json(self.adapter / ADAPTER_CONFIG).get("task_type")) == CLASSIFIER
        kinds = read_json(self.folder / "config.json").get("architectures") or []
        return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer: the adapter's, if it has one."""
        return self.folder if self.adapter is None else tokenizer_folder(self.adapter, self.folder)


@dataclass(frozen=True)
class Written:
    """Description of the written folder."""

    is_reward: bool
    dtype: str
    parameters: int
    architecture: str
    files: dict[str, int]
    """Sizes in bytes by name."""
    serving_advice: list[str] = field(default_factory=list)
    """Sentences about serving a model that thinks."""
    format: str = "transformers"
    """Value of ``--format``."""


@dataclass
class Agreement:
    """Result of a verification, for the user and the model card."""

    what: str
    """``tokens`` or ``scores``."""
    prompts: int
    compared: int
    """Tokens, or scores, that agree in every engine."""
    engines: list[str] = field(default_factory=list)
    largest_gap: float = 0.0
    """Largest difference between two engines: of a chosen token's log-probability in nats, or of a score."""
    ties: int = 0
    """Answers that diverge at two tokens of equal probability."""
    rounding: int | None = None
    """Answers that change only by the type of the written weights; None if the weights keep their type."""
    unchecked: str | None = None
    """The reason if vLLM was not checked."""

    def add(self, engines: Sequence[str], gap: float, ties: int, compared: int) -> None:
        """Add the comparison of two engines."""
        self.engines = list(dict.fromkeys([*self.engines, *engines]))
        self.largest_gap = max(self.largest_gap, gap)
        self.ties += ties
        self.compared = compared if self.compared == 0 else min(self.compared, compared)


def silence_transformers() -> None:
    """Turn off transformers' progress bars and warnings in this process, whose output is the command's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ``UserError`` for a file that is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}.")
    return content


def check_source(source: Source) -> None:
    """Raise ``UserError`` for pickled or quantized weights and for a model's own code. Imports no torch."""
    check_folder(source.folder)
    if source.adapter is not None:
        check_adapter(source.adapter)
    stored = source.folder / STORED
    if stored.is_file():
        method = (read_json(stored).get("tuning") or {}).get("method")
        raise UserError(
            f"{source.folder}: its adapter of tuning {method} cannot be merged into the weights, so no plain folder "
            "can hold it. Elsewhere the weights alone would answer as before the training. Use the checkpoint with "
            "align, or train with a tuning that can be merged: lora, prompt, p_tuning, or adapters with position "
            "parallel."
        )
    config = read_json(source.folder / "config.json")
    if "auto_map" in config:
        raise UserError(
            f"{source.folder}/config.json names Python code that comes with the model, which is not run here; bring "
            "the model in through a model stage."
        )


def load_source(source: Source, dtype: str = "float32") -> Any:
    """Load the model to the CPU, in eval mode, as ``dtype``; an adapter is merged in float32 before.

    Raises ``UserError`` for weights that are missing or do not fit, and for an adapter that cannot be merged.
    """
    import torch

    from align.models.checkpoints.conversion import attach
    from align.models.loading import load_policy, load_reward, new_reward

    torch_dtype = getattr(torch, dtype)
    if source.adapter is None:
        return (load_reward if source.is_reward() else load_policy)(source.folder, torch_dtype)
    # The adapter brings its own score head, so the base's may be missing.
    base = (new_reward if source.is_reward() else load_policy)(source.folder)
    return attach(base, source.adapter, merge=True).to(torch_dtype)


def export(source: Source, out: Path, dtype: str | None = None, shard: str = SHARD) -> Written:
    """Write ``source`` to the folder ``out``; ``dtype`` is float32, bfloat16 or None for the type of its weights.

    Raises ``UserError`` for everything that :func:`check_source` and :func:`load_source` refuse, and for weights that
    are not finite.
    """
    from align.models.checkpoints.conversion import require_finite
    from align.models.checkpoints.folder_checks import require_embeddings
    from align.models.loading import load_tokenizer
    from align.models.reward import Steps

    check_source(source)
    tokenizer = load_tokenizer(source.tokenizer_folder)
    # By default the weights keep the type that they have on disk.
    written_dtype = dtype or stored_type(source.folder)
    model = load_source(source, written_dtype)
    require_embeddings(
        tokenizer,
        model,
        str(source.tokenizer_folder),
        "the adapter was trained on a base with added tokens. Name that one with --base.",
    )
    # Check before anything is written: a folder with NaN would load everywhere and give no answers.
    require_finite(model, source.folder)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            _set_special_tokens(config, tokenizer)
    model.save_pretrained(out, max_shard_size=shard)
    tokenizer.save_pretrained(out)
    steps = Steps.read(source.folder)
    if steps is not None:  # without this file a process reward model would score whole answers
        steps.write(out)
    return Written(
        is_reward=source.is_reward(),
        dtype=written_dtype,
        parameters=sum(weight.numel() for weight in model.parameters()),
        architecture=type(model).__name__,
        files=file_sizes(out),
        serving_advice=[] if source.is_reward() else serving_advice(tokenizer, model.config.model_type),
    )


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of the files in a folder, by name."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def _set_special_tokens(config: Any, tokenizer: Any) -> None:
    """Write the tokenizer's eos and pad tokens into a config; further eos tokens stay."""
    # A generation config may name several tokens that end an answer.
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def stored_type(folder: Path) -> str:
    """Return the type of a model folder's weights; float32 if its config has no type or a rare type."""
    config = read_json(folder / "config.json")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"


def round_weights(model: nn.Module, dtype: str) -> Any:
    """Round ``model``'s weights to ``dtype`` in place, keeping their type; they then equal a written file's weights.

    ``model.to`` would also round tensors that are not saved: rotary frequencies, which shifts log-probabilities by
    thousandths.
    """
    import torch

    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, dtype)))
    return model


def round_activations(model: PreTrainedModel, kind: str) -> None:
    """Round the inputs of linear layers to int8 or float8, with one scale per token, as vLLM does for these formats.

    The output head is not quantized, so its input is not rounded.
    """
    import torch

    head = model.get_output_embeddings()

    def rounded(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        values, *rest = arguments
        largest = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        if kind == "int8":
            scale = largest / INT8_LARGEST
            return ((values / scale).round() * scale, *rest)
        scale = largest / FLOAT8_LARGEST
        return ((values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale, *rest)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.register_forward_pre_hook(rounded)


def prepare(folder: Path, repo: str, license: License, revision: str | None, private: bool) -> Upload:
    """Return the upload of ``folder``, without using the network."""
    check_repo(repo, "model")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = tuple(Part(path.relative_to(folder).as_posix(), path) for path in files)
    return Upload(folder, repo, revision, private, parts, license)


def push(upload: Upload, message: str, api: Any = None) -> dict[str, Any]:
    """Create the repository if necessary and commit the upload. Returns ``url``, ``commit``, ``deleted``.

    The commit also deletes weights of an earlier export that it does not replace: a reader would load both. Only
    huggingface_hub handles the token, which is never printed. For datasets see ``align.data.push``.

    ``api`` is a ``huggingface_hub.HfApi``. Raises ``UserError`` if the Hub refuses (no token, no right, a public
    repository that should be private) and ``StageFailed`` if it cannot be reached.
    """
    from huggingface_hub import HfApi

    api = api or HfApi(library_name="align")
    with hub_errors(upload.repo):
        existing = make_repository(api, upload.repo, "model", upload.revision, upload.private)
        commit = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            repo_type="model",
            revision=upload.revision,
            commit_message=message,
            delete_patterns=list(WEIGHTS),
        )
    # delete_patterns removes matching files that the upload does not contain; report those.
    uploaded = {part.name for part in upload.parts}
    other_files = [name for name in existing if name not in uploaded]
    deleted = sorted(name for name in other_files if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS))
    return {"url": str(commit.commit_url), "commit": str(commit.oid), "deleted": deleted}
