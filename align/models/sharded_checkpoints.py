"""Recognize checkpoints of DeepSpeed, FSDP and verl, which are pickled, and name the command that converts them.

align opens no pickle: whoever wrote one runs code on the machine that reads it. The tools that wrote these checkpoints
convert them (docs/decisions/0043-checkpoints-from-elsewhere.md). Torch-free.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from align.models.files import CONFIG

DEEPSPEED = "*_model_states.pt"
"""States that every rank of DeepSpeed writes, in ``global_step100`` below the checkpoint."""
FSDP = "*.distcp"
"""Files of torch.distributed.checkpoint, in ``pytorch_model_fsdp_0`` below a checkpoint of accelerate."""
VERL = "model_world_size_*_rank_*.pt"


def explain_sharded(folder: Path) -> str | None:
    """Return the message for a sharded checkpoint: its kind, and the commands that convert it; None for any other."""
    converted = folder.parent / f"{folder.name}-converted"
    for name, pattern, command in (
        ("DeepSpeed's", DEEPSPEED, _deepspeed),
        ("torch.distributed.checkpoint's (FSDP)", FSDP, _fsdp),
        ("verl's", VERL, _verl),
    ):
        shards = next((part for part in _folders(folder) if any(part.glob(pattern))), None)
        if shards is not None:
            return (
                f"{folder}: is a checkpoint in {name} format, whose files are pickles, which run code when opened; "
                "align loads safetensors only. Where you trust it, convert it once, and name the result as source:\n"
                f"  {command(folder, shards, converted)}\n"
                f"  {_settings(folder, shards, converted)}"
            )
    return None


def _folders(folder: Path) -> list[Path]:
    """Return the folder and those below it in which the tools put their shards, the newest step first."""
    below = sorted((path for path in folder.iterdir() if path.is_dir()), key=_step, reverse=True)
    return [folder, *below]


def _step(folder: Path) -> tuple[int, str]:
    digits = "".join(character for character in folder.name if character.isdigit())
    return (int(digits[:18]) if digits else -1, folder.name)


def _deepspeed(folder: Path, shards: Path, converted: Path) -> str:
    # DeepSpeed's own script cannot write tied embeddings as safetensors, and the copy of it in a checkpoint is not run.
    above = shards.parent if shards == folder else folder
    code = (
        "import sys; from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read; "
        "from transformers import AutoConfig, AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).float(); "
        "model.load_state_dict(read(sys.argv[2], sys.argv[3])); model.save_pretrained(sys.argv[4])"
    )
    settings = _settings_folder(folder, shards)
    config = "BASE" if settings is None else _quoted(settings)
    return f'python -c "{code}" {config} {_quoted(above)} {_quoted(Path(shards.name))} {_quoted(converted)}'


def _fsdp(folder: Path, shards: Path, converted: Path) -> str:
    return f"accelerate merge-weights {_quoted(shards)} {_quoted(converted)}"


def _verl(folder: Path, shards: Path, converted: Path) -> str:
    command = "python -m verl.model_merger merge --backend fsdp"
    return f"{command} --local_dir {_quoted(shards)} --target_dir {_quoted(converted)}"


def _settings(folder: Path, shards: Path, converted: Path) -> str:
    """Return the command that adds what the weights' tools leave out: config and tokenizer."""
    settings = _settings_folder(folder, shards)
    if settings is None:
        return (
            f"hf download BASE --local-dir {_quoted(converted)} --include '*.json'  # config and tokenizer of the base"
        )
    names = " -o ".join(f"-name '*{suffix}'" for suffix in (".json", ".jinja", ".model", ".txt"))
    return f"find {_quoted(settings)} -maxdepth 1 \\( {names} \\) -exec cp {{}} {_quoted(converted)} \\;"


def _settings_folder(folder: Path, shards: Path) -> Path | None:
    """Return the folder with the model's config, at one of the places where the tools write it."""
    return next(
        (place for place in (folder, shards.parent, shards / "huggingface") if (place / CONFIG).is_file()), None
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
