"""Take the text part out of a multimodal checkpoint, and put a trained text part back.

A multimodal checkpoint has a config with a ``text_config`` and tensors of the text part below ``language_model``. Its
text part is a plain checkpoint of another type (``gemma3`` has a ``gemma3_text``), which every stage trains. The rest,
its vision tower, config and processor, is kept with the model stage's result until ``align export``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.checkpoints.files import CONFIG, INDEX, SINGLE, read_object, read_optional, weight_files

FOLDER = "multimodal"
"""Folder of a model stage's result with the other parts of a multimodal checkpoint."""
NAMES = "text_tensors.json"
"""Names of the text part's tensors in the checkpoint, by their names in the text part."""
PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
"""Start of a name in a multimodal checkpoint -> start of the name in its text part."""
COPIED = (".json", ".txt", ".jinja", ".model")
INHERITED = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""Fields that a text part takes from the whole config if it lacks them."""
HEAD = "lm_head.weight"


def is_multimodal(folder: Path) -> bool:
    """Return True for the folder of a checkpoint with a text part that transformers can load by itself."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    text = read_optional(folder / CONFIG).get("text_config")
    kind = str(text.get("model_type")) if isinstance(text, dict) else ""
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


def split(folder: Path, text: Path, rest: Path) -> None:
    """Write the text part of the checkpoint in ``folder`` to ``text``, and everything else to ``rest``.

    Raises ``UserError`` for a checkpoint without tensors of a text part.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    text.mkdir(parents=True)
    rest.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix in COPIED and file.name not in (INDEX, CONFIG):
            shutil.copyfile(file, text / file.name)
            shutil.copyfile(file, rest / file.name)
    # 1. Divide the tensors, one file at a time.
    names: dict[str, str] = {}
    text_files: dict[str, str] = {}
    others: dict[str, torch.Tensor] = {}
    for number, file in enumerate(weight_files(folder)):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is not a mapping
                short_name = text_name(name)
                if short_name is None:
                    others[name] = opened.get_tensor(name)
                else:
                    tensors[short_name] = opened.get_tensor(name)
                    names[short_name] = name
        if tensors:
            shard = f"model-{number + 1:05}.safetensors"
            save_file(tensors, text / shard, {"format": "pt"})
            text_files |= dict.fromkeys(tensors, shard)
    if not names:
        raise UserError(f"{folder}: has a text_config and no tensor below language_model. Fetch the model again.")
    save_file(others, rest / SINGLE, {"format": "pt"})
    # 2. Write the configs: the text part's own, and the whole one.
    (text / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": text_files}), encoding="utf-8")
    config = read_object(folder / CONFIG)
    part = {name: config[name] for name in INHERITED if name in config} | config["text_config"]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[part["model_type"]]]
    part["architectures"] = [model_class.__name__]
    # Types differ in which config's field they read, so the tensors decide.
    part["tie_word_embeddings"] = HEAD not in names
    (text / CONFIG).write_text(json.dumps(part, indent=2), encoding="utf-8")
    shutil.copyfile(folder / CONFIG, rest / CONFIG)
    (rest / NAMES).write_text(json.dumps(names, indent=1), encoding="utf-8")


def text_name(name: str) -> str | None:
    """Return the name that a checkpoint's tensor has in the text part; None for a tensor of another part."""
    for prefix, short_prefix in PREFIXES.items():
        if name.startswith(prefix):
            return short_prefix + name.removeprefix(prefix)
    return None


def join(rest: Path, folder: Path) -> str:
    """Turn the text part in ``folder`` into the whole checkpoint, with the other parts of ``rest`` as they were.

    Returns the name of its class in transformers.
    """
    from safetensors.torch import load_file, save_file

    names = read_object(rest / NAMES)
    text = read_object(folder / CONFIG)
    weight_map: dict[str, str] = {}
    # A head that was tied may have a tensor now; its name depends on the names of the other tensors.
    has_prefix = any(name.startswith("language_model.") for name in names.values())
    new_head = {HEAD: f"language_model.{HEAD}" if has_prefix else HEAD}
    files = weight_files(folder)
    for number, file in enumerate((*files, rest / SINGLE), start=1):
        tensors = load_file(file)
        if file.parent == folder:
            file.unlink()
            tensors = {(new_head | names)[name]: value for name, value in tensors.items()}
        shard = f"model-{number:05}-of-{len(files) + 1:05}.safetensors"
        save_file(tensors, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    config = read_object(rest / CONFIG)
    inherited = {name: text[name] for name in INHERITED if name in text}
    config |= {name: value for name, value in inherited.items() if name in config}
    unchanged = ("architectures", "dtype", "tie_word_embeddings")
    config["text_config"] |= {name: value for name, value in text.items() if name not in unchanged}
    if HEAD not in names and new_head[HEAD] in weight_map:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in _missing_files(rest, folder):
        shutil.copyfile(file, folder / file.name)
    return str((config.get("architectures") or [config["model_type"]])[0])


def _missing_files(rest: Path, folder: Path) -> Iterator[Path]:
    """Yield the processor's files and others that the text part has no file for."""
    for file in sorted(rest.iterdir()):
        if file.suffix in COPIED and file.name not in (NAMES, INDEX) and not (folder / file.name).exists():
            yield file


def rest_of(artifacts: list[Any]) -> Path | None:
    """Return the other parts of the checkpoint that the last of ``artifacts`` with such parts came from."""
    folders = [artifact.path / FOLDER for artifact in reversed(artifacts)]
    return next((folder for folder in folders if folder.is_dir()), None)
