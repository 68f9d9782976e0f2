"""Load models and tokenizers safely. Every call of ``from_pretrained`` in align is here.

A folder is checked before a library sees it. Only safetensors are read. Code that comes with a model runs only when the
caller allows it, as the ``model`` stage does by its config. A model is refused when its weights differ from those that
its config asks for: transformers would fill missing ones with random numbers and drop the others. Torch-free at import.
Excluded: what a stage needs beyond an intact model (``loading.py``).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from align.errors import UserError
from align.models.checkpoints.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, read_header, refuse_links
from align.models.checkpoints.folder_checks import (
    check_adapter,
    check_folder,
    check_gguf,
    check_tokenizer,
    tensor_entries,
)
from align.models.score_heads import classifier_class
from align.patches.transformers import revert_conversion
from align.pipeline.process_limits import resume_collections

Task = Literal["causal", "classifier", "encoder"]
AUTO_CLASSES: dict[Task, str] = {
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}
MAPPINGS: dict[Task, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "encoder": "MODEL_MAPPING",
}
"""transformers' names of its classes by the type of config."""
SCORE_CAP = "attn_logit_softcapping"
"""Field with a soft cap on attention's scores, which torch's attention (sdpa) ignores."""
CAPPED = ("gemma2", "vaultgemma")
"""Types of model whose eager attention applies the cap."""
NAMED = 5
"""Most tensors that a message names."""


def _limit_templates() -> None:
    # Imported late, because it imports jinja2, which a plan does not need.
    from align.models.chat.chat_template import limit_templates

    limit_templates()


def open_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return a model folder's config.

    Raises ``UserError`` for a folder that transformers refuses or has no class for.
    """
    from transformers import AutoConfig

    check_folder(folder)
    with refusing(folder / CONFIG):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not hasattr(config.get_text_config(), "vocab_size"):
        raise UserError(f"{folder / CONFIG}: {config.model_type} is no language model. Name another model.")
    return config


def open_tokenizer(folder: Path | str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder, or of a Hub name at ``revision``, with a bounded template (``chat_template.py``).

    Raises ``UserError`` for files that are damaged or hostile, and for code that would have to run.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    if (path / CONFIG).is_file() and any(path.glob("*.safetensors*")):
        check_folder(path)
    elif path.is_dir():
        refuse_links(path)
        check_tokenizer(path, None)
    _limit_templates()
    with refusing(folder):
        return AutoTokenizer.from_pretrained(str(folder), revision=revision, trust_remote_code=trust_remote_code)


def open_model(
    task: Task,
    folder: Path,
    dtype: Any,
    *,
    may_lack: Collection[str] = (),
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Any, set[str]]:
    """Load the model in a folder to the CPU; return it and the names of ``may_lack`` that its files lack.

    ``options`` override fields of its config. The shapes that the config asks for are compared with the files' headers
    before any tensor is read. Raises ``UserError`` for tensors that are missing, unexpected or of another shape.
    """
    import transformers

    # 1. Check the files and compare the shapes. No tensor is read yet.
    config = open_config(folder, trust_remote_code=trust_remote_code)
    # transformers would load an adapter in the folder on top of the weights, wherever its base is.
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: is an adapter next to weights. Remove it, or merge it by `align export`."
        )
    if not trust_remote_code:  # only its own code knows which tensors such a model has
        compare_shapes(task, folder, config, may_lack, options)
    # 2. Load. transformers draws numbers for missing weights, so the random state is kept.
    auto: Any = getattr(transformers, AUTO_CLASSES[task])
    if task == "classifier" and type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        auto = classifier_class(config) or auto
    if needs_eager_attention(folder, config, has_own_code=trust_remote_code):
        options["attn_implementation"] = "eager"
    resume_collections()
    with _preserved_rng(), refusing(folder):
        model, info = auto.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    # 3. Check what was loaded. A model with its own code was not compared before.
    refuse_misfits(task, folder, info, may_lack)
    return model, set(info["missing_keys"]) & set(may_lack)


def with_tensors(model: Any, tensors: dict[str, Any]) -> Any:
    """Return a model like ``model`` from tensors by their names in its files, which may differ from its own names.

    transformers stores each expert of a mixture and computes with all experts of a layer as one tensor.
    """
    with _quiet(), _preserved_rng():
        rebuilt, info = type(model).from_pretrained(
            None, config=model.config, state_dict=tensors, dtype=model.dtype, output_loading_info=True
        )
    task: Task = "classifier" if hasattr(model, "score") else "causal"
    refuse_misfits(task, Path(model.config.name_or_path), info)
    return rebuilt.eval()


def stored_tensors(folder: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return tensors of the causal model in ``folder`` by their names in its files: the reverse of ``with_tensors``."""
    return revert_conversion(empty_model(folder), tensors)


@lru_cache(maxsize=2)
def empty_model(folder: Path) -> Any:
    """Return the causal model of a folder without memory."""
    import torch
    import transformers

    with torch.device("meta"), _quiet(), _preserved_rng():
        return transformers.AutoModelForCausalLM.from_config(open_config(folder), trust_remote_code=False)


def needs_eager_attention(folder: Path, config: Any, has_own_code: bool = False) -> bool:
    """Return True if the config asks for a soft cap on attention's scores, which transformers drops under sdpa.

    transformers itself avoids sdpa for models with attention sinks, and sdpa's masks have the sliding windows. Raises
    ``UserError`` for a model whose attention has no cap at all.
    """
    cap = getattr(config.get_text_config(), SCORE_CAP, None)
    model_type = config.get_text_config().model_type
    if cap is None:
        return False
    if model_type not in CAPPED and not has_own_code:
        raise UserError(
            f"{folder / CONFIG}: {SCORE_CAP} is {cap:g}, and transformers' {model_type} does not apply it. Set it to "
            "null if the model was trained without the cap, or name another model."
        )
    return True


def compare_shapes(
    task: Task, folder: Path, config: Any, may_lack: Collection[str] = (), options: dict[str, Any] | None = None
) -> None:
    """Raise ``UserError`` unless the files hold the tensors that the config asks for, by name and shape.

    transformers' own loader compares them on the meta device, with its rules for tied, renamed and merged weights. No
    tensor is read.
    """
    import copy

    import torch
    import transformers

    # The config as from_pretrained would change it.
    expected_config = copy.deepcopy(config)
    for name, value in (options or {}).items():
        setattr(expected_config, name, value)
    classes: Any = getattr(transformers, MAPPINGS[task])
    kind = classifier_class(expected_config) if task == "classifier" else classes.get(type(expected_config), None)
    if kind is None:
        raise UserError(
            f"{folder / CONFIG}: {expected_config.model_type} has no {AUTO_CLASSES[task]}. Name another model."
        )
    entries = tensor_entries(folder)
    # Tensors of the files' shapes without memory, for transformers to load into a model without memory.
    tensors = {name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()}
    with _quiet(), _preserved_rng(), refusing(folder):
        _, info = kind.from_pretrained(
            None,
            config=expected_config,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_misfits(task, folder, info, may_lack)


def refuse_misfits(task: Task, folder: Path, info: dict[str, Any], may_lack: Collection[str] = ()) -> None:
    """Raise ``UserError`` for tensors that transformers' loading info lists as missing, unexpected or mismatched.

    Tied heads and computed buffers are not among them. A classifier or encoder made from a causal model ignores its
    head; an encoder's pooler is not used.
    """
    missing = sorted(set(info["missing_keys"]) - set(may_lack))
    if task == "encoder":
        missing = [name for name in missing if "pooler" not in name]
    unused = sorted(name for name in info["unexpected_keys"] if not _is_unused_head(task, name))
    mismatched = sorted(info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{folder}: lacks {_count(missing)} that its {CONFIG} asks for: {_named(missing)}. Random numbers would "
            "stand there. The model is damaged, or the config is another model's. Fetch the model again."
        )
    if mismatched:
        name, stored, expected = mismatched[0]
        raise UserError(
            f"{folder}: the tensor {name} is of shape {list(stored)}, and its {CONFIG} asks for {list(expected)} "
            f"({_count(mismatched)} in all). The config is another model's. Fetch the model again."
        )
    if unused:
        raise UserError(
            f"{folder}: holds {_count(unused)} for which its {CONFIG} has no place: {_named(unused)}. They would be "
            "dropped. The config is another model's, or the model is of another kind. Fetch the model again."
        )
    if info["error_msgs"]:
        raise UserError(f"{folder}: {_first_line(info['error_msgs'][0])} Fetch the model again.")


def _is_unused_head(task: Task, name: str) -> bool:
    """Return True for a tensor of the vocabulary head and, for an encoder, for one outside its layers."""
    if task == "classifier":
        return name in ("lm_head.weight", "lm_head.bias", "embed_out.weight")
    return task == "encoder" and not any(part.isdigit() for part in name.split("."))


def _count(names: list[Any]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _named(names: list[str]) -> str:
    omitted = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {omitted} more" if omitted > 0 else "")


def open_gguf(gguf: Path, dtype: Any) -> tuple[Any, Any]:
    """Load tokenizer and model of a GGUF file, dequantized."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    _limit_templates()
    resume_collections()
    # transformers also reads files next to a GGUF. They are not part of the model's identity, so it sees the GGUF only.
    with tempfile.TemporaryDirectory(prefix="align-gguf-") as isolated, refusing(gguf):
        (Path(isolated) / gguf.name).symlink_to(gguf.resolve())
        check_gguf(gguf)
        tokenizer = transformers.AutoTokenizer.from_pretrained(isolated, gguf_file=gguf.name, trust_remote_code=False)
        with _preserved_rng():
            model, info = auto.from_pretrained(
                isolated, gguf_file=gguf.name, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    refuse_misfits("causal", gguf, info)
    tokenizer.name_or_path = model.config.name_or_path = str(gguf)
    return tokenizer, model


def open_static(folder: Path) -> Any:
    """Load a model2vec model: word vectors with a tokenizer. Raises ``ImportError`` where model2vec is missing."""
    from model2vec import StaticModel

    refuse_links(folder)
    with refusing(folder):
        return StaticModel.from_pretrained(folder, force_download=False)


def adapter_config(adapter: Path) -> Any:
    """Load peft's config of an adapter. Raises ``UserError`` for an adapter that names code or files to load."""
    from peft import PeftConfig

    check_adapter(adapter)
    with refusing(adapter):
        return PeftConfig.from_pretrained(str(adapter))


def attach_adapter(base: Any, adapter: Path) -> tuple[Any, list[str]]:
    """Put the adapter of a folder on ``base``, in place; return the peft model and peft's warnings.

    Raises peft's own errors if it does not fit, and ``UserError`` for tensors that ``base`` has no place for, which
    peft would drop silently.
    """
    from peft import PeftModel, get_peft_model_state_dict

    check_adapter(adapter)
    with _preserved_rng(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu")
    # peft drops tensors that match no module, so compare the file's names with those in the model.
    names = model.state_dict().keys()
    known_names = get_peft_model_state_dict(model, save_embedding_layers=False).keys() | names
    # Tied and resized embeddings are written twice, the second time under the module's name without the adapter's.
    known_names |= {name.replace(".default", "") for name in names}
    unused = sorted(read_header(adapter / ADAPTER_WEIGHTS).keys() - known_names)
    if unused:
        raise UserError(
            f"{adapter / ADAPTER_WEIGHTS}: holds {_count(unused)} for which the base has no place: {_named(unused)}. "
            "They would be dropped. Name the adapter's own base."
        )
    return model, [str(warning.message) for warning in caught]


@contextmanager
def refusing(place: Path | str) -> Iterator[None]:
    """Turn a library's error about files that it cannot read into a ``UserError`` with their place.

    A damaged file can make a library raise anything. A full disk or memory is not the file's fault and passes.
    """
    try:
        yield
    except (UserError, MemoryError, ImportError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(_unreadable(place, error)) from error
    except Exception as error:
        raise UserError(_unreadable(place, error)) from error


def _unreadable(place: Path | str, error: Exception) -> str:
    text = str(error)
    if "custom code" in text or "trust_remote_code" in text:
        return (
            f"{place}: cannot be loaded without running Python code that comes with it, which is not done here. A "
            "`model` stage with `trust_remote_code: true` runs it, if you trust it."
        )
    error_type = type(error).__name__
    return f"{place}: cannot be loaded: {error_type}: {_first_line(text)} Fetch it again, or name another model."


def _first_line(text: Any) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()] or ["no message"]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    line = line if len(line) <= 300 else f"{line[:300]}…"
    return line if line.endswith((".", "…", "!", "?")) else f"{line}."


@contextmanager
def _preserved_rng() -> Iterator[None]:
    """Restore torch's random state, from which transformers draws the weights that a model lacks."""
    import torch

    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report and progress bar for a comparison without loading."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
