"""The one door through which models and tokenizers come into a process: every call of ``from_pretrained`` is here.

A folder is checked before a library sees it, only safetensors are read, and no code that comes with a model is run
unless the caller says so, which the ``model`` stage alone does, by its config. A model is refused whose weights are not
those that its config asks for: transformers fills what is missing with random numbers and drops what is left over. Left
out: what a stage needs of a model beyond being whole (``loading.py``).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from align.errors import UserError
from align.models.chat_template import bound_templates
from align.models.files import CONFIG, refuse_links
from align.models.folder_checks import ADAPTER_WEIGHTS, check_adapter, check_folder, check_gguf, tensor_entries
from align.models.headers import read_header
from align.models.tokenizer_checks import check_tokenizer

Task = Literal["causal", "classifier", "encoder"]
AUTO_CLASSES: dict[Task, str] = {
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}
NAMED = 5
"""Tensors that a message names."""


def open_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a model folder. Raises ``UserError`` for one that transformers refuses or has no class for."""
    from transformers import AutoConfig

    check_folder(folder)
    with refusing(folder / CONFIG):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not hasattr(config.get_text_config(), "vocab_size"):
        raise UserError(f"{folder / CONFIG}: {config.model_type} is no language model. Name another model.")
    return config


def open_tokenizer(folder: Path | str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, or of a Hub name at ``revision``; its chat template is bounded (``chat_template.py``).

    Raises ``UserError`` for files that are damaged or hostile, and for code that would have to be run.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    if (path / CONFIG).is_file() and any(path.glob("*.safetensors*")):
        check_folder(path)
    elif path.is_dir():
        refuse_links(path)
        check_tokenizer(path, None)
    bound_templates()
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
    """The model in a folder, on the CPU, and which of ``may_lack`` its files did not hold.

    ``options`` go into its config. The shapes that the config asks for are compared with the files' headers before
    anything is read. Raises ``UserError`` for tensors that are missing, left over or of another shape.
    """
    import transformers

    config = open_config(folder, trust_remote_code=trust_remote_code)
    _refuse_adapter(folder)
    if not trust_remote_code:  # a model of its own code is built by that code alone
        compare_shapes(task, folder, config, may_lack, options)
    auto: Any = getattr(transformers, AUTO_CLASSES[task])
    with _undisturbed(), refusing(folder):
        model, info = auto.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    refuse_misfits(task, folder, info, may_lack)
    return model, set(info["missing_keys"]) & set(may_lack)


def _refuse_adapter(folder: Path) -> None:
    """transformers would load it on top of the weights, from wherever its config says."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder / 'adapter_config.json'}: an adapter among the weights, so it is not said which model is meant. "
            "Remove the adapter's files, or merge it by `align export`."
        )


def compare_shapes(
    task: Task, folder: Path, config: Any, may_lack: Collection[str] = (), options: dict[str, Any] | None = None
) -> None:
    """Raise ``UserError`` unless the files hold the tensors that the config asks for, by name and shape.

    transformers' own loader compares them on the meta device, with its rules for tied, renamed and merged weights:
    no tensor is read.
    """
    import copy

    import torch
    import transformers

    wanted = copy.deepcopy(config)
    for name, value in (options or {}).items():
        setattr(wanted, name, value)
    auto: Any = getattr(transformers, AUTO_CLASSES[task])
    if type(wanted) not in auto._model_mapping:
        raise UserError(
            f"{folder / CONFIG}: {wanted.model_type} has no {AUTO_CLASSES[task]} in transformers. Name a language "
            "model."
        )
    entries = tensor_entries(folder)
    tensors = {name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()}
    with _quiet(), _undisturbed(), refusing(folder):
        _, info = auto._model_mapping[type(wanted)].from_pretrained(
            None,
            config=wanted,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_misfits(task, folder, info, may_lack)


def refuse_misfits(task: Task, folder: Path, info: dict[str, Any], may_lack: Collection[str] = ()) -> None:
    """Raise ``UserError`` for tensors that transformers' loading info calls missing, left over or of another shape.

    What transformers documents as ignorable (tied heads, buffers that are computed) is not among them. A classifier or
    an encoder made from a causal model leaves its head aside; an encoder's pooler is not used.
    """
    missing = sorted(set(info["missing_keys"]) - set(may_lack))
    if task == "encoder":
        missing = [name for name in missing if "pooler" not in name]
    left = sorted(name for name in info["unexpected_keys"] if not _is_unused_head(task, name))
    misfits = sorted(info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{folder}: lacks {_count(missing)} that its {CONFIG} asks for: {_named(missing)}. Random numbers would "
            "stand there. The model is damaged, or the config is another model's. Fetch the model again."
        )
    if misfits:
        name, stored, expected = misfits[0]
        raise UserError(
            f"{folder}: the tensor {name} is of shape {list(stored)}, and its {CONFIG} asks for {list(expected)} "
            f"({_count(misfits)} in all). The config is another model's. Fetch the model again."
        )
    if left:
        raise UserError(
            f"{folder}: holds {_count(left)} for which its {CONFIG} has no place: {_named(left)}. They would be "
            "dropped. The config is another model's, or the model is of another kind. Fetch the model again."
        )
    if info["error_msgs"]:
        raise UserError(f"{folder}: {_first_line(info['error_msgs'][0])} Fetch the model again.")


def _is_unused_head(task: Task, name: str) -> bool:
    """True for a tensor of a head over the vocabulary, and for an encoder for one that is in no layer."""
    if task == "classifier":
        return name in ("lm_head.weight", "lm_head.bias", "embed_out.weight")
    return task == "encoder" and not any(part.isdigit() for part in name.split("."))


def _count(names: list[Any]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _named(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def open_gguf(gguf: Path, dtype: Any) -> tuple[Any, Any]:
    """Tokenizer and model of a GGUF file, dequantized.

    transformers also reads files beside a GGUF, which are no part of the model's identity: it is shown the file alone.
    """
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    bound_templates()
    with tempfile.TemporaryDirectory(prefix="align-gguf-") as isolated, refusing(gguf):
        (Path(isolated) / gguf.name).symlink_to(gguf.resolve())
        check_gguf(gguf)
        tokenizer = transformers.AutoTokenizer.from_pretrained(isolated, gguf_file=gguf.name, trust_remote_code=False)
        with _undisturbed():
            model, info = auto.from_pretrained(
                isolated, gguf_file=gguf.name, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    refuse_misfits("causal", gguf, info)
    tokenizer.name_or_path = model.config.name_or_path = str(gguf)
    return tokenizer, model


def open_static(folder: Path) -> Any:
    """A model2vec model: word vectors with a tokenizer. Raises ``ImportError`` where model2vec is not installed."""
    from model2vec import StaticModel

    refuse_links(folder)
    with refusing(folder):
        return StaticModel.from_pretrained(folder, force_download=False)


def adapter_config(adapter: Path) -> Any:
    """peft's config of an adapter's folder. Raises ``UserError`` for one that names code or files to load."""
    from peft import PeftConfig

    check_adapter(adapter)
    with refusing(adapter):
        return PeftConfig.from_pretrained(str(adapter))


def attach_adapter(base: Any, adapter: Path) -> tuple[Any, list[str]]:
    """``base`` with the adapter of a folder on it, by peft, and what peft warned of; ``base`` itself is changed.

    Raises peft's own errors where it does not fit, and ``UserError`` for tensors that ``base`` has no place for: peft
    drops them without a word.
    """
    from peft import PeftModel, get_peft_model_state_dict

    check_adapter(adapter)
    with _undisturbed(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu")
    taken = get_peft_model_state_dict(model, save_embedding_layers=False).keys() | model.state_dict().keys()
    left = sorted(read_header(adapter / ADAPTER_WEIGHTS).keys() - taken)
    if left:
        raise UserError(
            f"{adapter / ADAPTER_WEIGHTS}: holds {_count(left)} for which the base has no place: {_named(left)}. They "
            "would be dropped. Name the adapter's own base with --base."
        )
    return model, [str(warning.message) for warning in caught]


@contextmanager
def refusing(place: Path | str) -> Iterator[None]:
    """Turn a library's error about files that it cannot take into the user's, with the place.

    Libraries raise whatever a damaged file leads them into; a full disk or memory is not the file's fault.
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
    kind = type(error).__name__
    return f"{place}: cannot be loaded: {kind}: {_first_line(text)} Fetch it again, or name another model."


def _first_line(text: Any) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()] or ["no message"]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    line = line if len(line) <= 300 else f"{line[:300]}…"
    return line if line.endswith((".", "…", "!", "?")) else f"{line}."


@contextmanager
def _undisturbed() -> Iterator[None]:
    """transformers draws what a model lacks from the caller's randomness, which is put back."""
    import torch

    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' report and bar of a comparison, which loads nothing, are for nobody."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
