"""Which trainer options exist, read from the installed source of trl and transformers without importing either.

``trainer:`` in a stage passes options straight to trl's (or PPO's) config class. Checking them by importing the class
would cost seconds and torch; reading the class bodies with ``ast`` takes milliseconds, and follows whatever
version is installed. Leaves out cross-field rules: the class itself checks those when the stage runs.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.validation import nearest

CLASSES: dict[str, tuple[str, str, str]] = {
    "sft": ("trl", "trainer/sft_config.py", "SFTConfig"),
    "reward": ("trl", "trainer/reward_config.py", "RewardConfig"),
    "dpo": ("trl", "trainer/dpo_config.py", "DPOConfig"),
    "kto": ("trl", "trainer/kto_config.py", "KTOConfig"),
    "cpo": ("trl", "experimental/cpo/cpo_config.py", "CPOConfig"),
    "orpo": ("trl", "experimental/orpo/orpo_config.py", "ORPOConfig"),
    "ppo": ("align", "rl/ppo/config.py", "PPOConfig"),
    "grpo": ("align", "rl/critic_free/config.py", "GRPOConfig"),
    "rloo": ("align", "rl/critic_free/config.py", "RLOOConfig"),
    "online_dpo": ("align", "rl/critic_free/config.py", "OnlineDPOConfig"),
    "rejection": ("align", "rl/critic_free/config.py", "BestOfNConfig"),
}
"""Stage kind → (package, file in it, config class)."""

EXPORTS: dict[str, tuple[str, str, str]] = {
    "TrainingArguments": ("transformers", "training_args.py", "TrainingArguments"),
    "PushToHubMixin": ("transformers", "utils/hub.py", "PushToHubMixin"),
}
"""Base classes imported from a package's front, whose file the import does not name."""

OWNED: dict[str, str] = {
    "learning_rate": "set 'learning_rate' beside 'trainer'",
    "num_train_epochs": "set 'epochs' beside 'trainer'",
    "max_steps": "set 'max_steps' beside 'trainer'",
    "per_device_train_batch_size": "set 'micro_batch_size' beside 'trainer'",
    "per_device_eval_batch_size": "set 'micro_batch_size' beside 'trainer'",
    "gradient_accumulation_steps": "set 'batch_size' and 'micro_batch_size' beside 'trainer'",
    "max_length": "set 'max_length' beside 'trainer'",
    "truncation_mode": "rows are cut, and counted, before the trainer sees them",
    "warmup_steps": "set 'warmup_ratio' beside 'trainer'",
    "lr_scheduler_type": "set 'scheduler' beside 'trainer'",
    "weight_decay": "set 'weight_decay' beside 'trainer'",
    "max_grad_norm": "set 'max_grad_norm' beside 'trainer'",
    "bf16": "set 'precision' beside 'trainer'",
    "fp16": "set 'precision' beside 'trainer'",
    "bf16_full_eval": "set 'precision' beside 'trainer'",
    "fp16_full_eval": "set 'precision' beside 'trainer'",
    "seed": "the pipeline's 'seed' decides",
    "data_seed": "the pipeline's 'seed' decides",
    "output_dir": "the store decides where files go",
    "save_strategy": "set 'save_steps' beside 'trainer'",
    "save_steps": "set 'save_steps' beside 'trainer'",
    "save_total_limit": "the last two checkpoints are kept until the stage is done",
    "save_only_model": "a checkpoint without its optimizer cannot resume exactly",
    "enable_jit_checkpoint": "checkpoints follow 'save_steps'",
    "resume_from_checkpoint": "a killed stage resumes by itself",
    "ignore_data_skip": "a killed stage resumes by itself",
    "load_best_model_at_end": "the last weights are the result",
    "eval_strategy": "set 'eval_steps' beside 'trainer'",
    "eval_steps": "set 'eval_steps' beside 'trainer'",
    "eval_on_start": "held-out rows are scored before and after training anyway",
    "logging_strategy": "every step is logged",
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "logging_nan_inf_filter": "a loss that is not finite stops the stage",
    "report_to": "set 'runtime.report_to'",
    "run_name": "a tracker's run is called as the stage",
    "project": "set 'runtime.tracking.project'",
    "disable_tqdm": "the console shows progress",
    "include_num_input_tokens_seen": "real tokens are always counted",
    "train_sampling_strategy": "rows are always grouped by length",
    "length_column_name": "rows are always grouped by length",
    "dataloader_num_workers": "rows are tokenized before training",
    "remove_unused_columns": "rows are tokenized before training",
    "dataset_num_proc": "rows are tokenized before training",
    "dataset_text_field": "rows are tokenized before training",
    "dataset_kwargs": "rows are tokenized before training",
    "model_init_kwargs": "the stage loads the model",
    "trust_remote_code": "the 'model' stage decides what code a model may bring",
    "chat_template_path": "the model's own chat template is used",
    "eos_token": "the model's own tokenizer is used",
    "pad_token": "the model's own tokenizer is used",
    "use_cpu": "set 'runtime.device'",
    "push_to_hub": "publish the finished artifact instead",
}
"""Options the stage sets itself, and what to do instead."""

OWNED_BY_PPO: dict[str, str] = {
    "num_train_epochs": "set 'updates' and 'num_epochs' beside 'trainer'",
    "max_steps": "set 'updates' beside 'trainer'",
    "per_device_eval_batch_size": "held-out prompts are the 'evaluate' stage's",
    "gradient_accumulation_steps": "set 'rollout_batch', 'num_mini_batches' and 'micro_batch_size' beside 'trainer'",
    "save_strategy": "set 'save_updates' beside 'trainer'",
    "save_steps": "set 'save_updates' beside 'trainer'",
    "enable_jit_checkpoint": "checkpoints follow 'save_updates'",
    "eval_strategy": "held-out prompts are the 'evaluate' stage's",
    "eval_steps": "held-out prompts are the 'evaluate' stage's",
    "eval_on_start": "held-out prompts are the 'evaluate' stage's",
    "logging_strategy": "every update is logged",
    "logging_steps": "every update is logged",
    "logging_first_step": "every update is logged",
    "train_sampling_strategy": "prompts are shuffled by the seed",
    "length_column_name": "prompts are shuffled by the seed",
}
"""Where PPO's stage has other words for it."""

_SIMPLE: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


@dataclass(frozen=True)
class Option:
    """One field of a config class: its annotation as written and the values it may take, where the source says so."""

    name: str
    annotation: str
    choices: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` has one of the plain types the annotation names; True where it names others too."""
        names = [part.strip().split("[")[0] for part in _split_union(self.annotation)]
        if any(name not in _SIMPLE for name in names):
            return True
        if isinstance(value, bool):  # Python's bool is an int; a YAML author's is not
            return "bool" in names
        return any(isinstance(value, _SIMPLE[name]) for name in names)


def check_trainer_options(kind: str, mapping: Mapping[str, Any], reserved: Iterable[str] = ()) -> None:
    """Check a ``trainer:`` block against the config class of stage ``kind`` (``sft``, ``reward``, ``dpo``, ``ppo``).

    ``reserved`` names the stage's own fields, beyond the shared ones, that the class also has. Raises ``ValueError``
    for the first key that does not exist (the nearest name is suggested), that the stage sets itself (its own field
    is named), or whose value has the wrong type.
    """
    options = trainer_options(kind)
    own = set(reserved)
    owned = OWNED | OWNED_BY_PPO if CLASSES[kind][0] == "align" else OWNED
    for name, value in mapping.items():
        option = options.get(name)
        if option is None:
            close = nearest(name, options)
            hint = f" Did you mean '{close}'?" if close else ""
            raise ValueError(f"unknown key '{name}': {CLASSES[kind][2]} has no such option.{hint}")
        if name in own:
            raise ValueError(f"'{name}' is not set here: set '{name}' beside 'trainer'.")
        if name in owned:
            raise ValueError(f"'{name}' is not set here: {owned[name]}.")
        if not option.accepts(value):
            raise ValueError(f"'{name}' should be {option.annotation}; found {value!r}.")
        if option.choices and value not in option.choices:
            raise ValueError(f"'{name}' should be one of {', '.join(map(repr, option.choices))}; found {value!r}.")


@functools.cache
def trainer_options(kind: str) -> dict[str, Option]:
    """Every option of the config class of ``kind``, base classes included, by name.

    Raises ``LookupError`` when the installed source no longer has the class where it is expected.
    """
    return class_options(*CLASSES[kind])


@functools.cache
def class_options(package: str, file: str, class_name: str) -> dict[str, Option]:
    """Every option of a dataclass in a package's source, base classes included, by name; none of it is imported.

    Raises ``LookupError`` when the source does not have it there.
    """
    path = package_folder(package) / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if found is None:
        raise LookupError(f"{path} has no class {class_name}; this version of {package} is not one align knows.")
    options: dict[str, Option] = {}
    for base in found.bases:
        place = _home(tree, ast.unparse(base).rpartition(".")[2], package, file)
        if place is not None:
            options |= class_options(*place)
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, ast.unparse(node.annotation)
            # ClassVar and underscore names are no dataclass options; nor are fields with init=False.
            if not name.startswith("_") and "ClassVar" not in annotation and not _computed(node.value):
                options[name] = Option(name, annotation, _choices(node.value))
    return options


def package_folder(package: str) -> Path:
    """Folder of a top-level package; finding its spec runs none of its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _home(tree: ast.Module, name: str, package: str, file: str) -> tuple[str, str, str] | None:
    """Where the base class ``name`` is defined: this file, the module it is imported from, or a known export."""
    if name in EXPORTS:
        return EXPORTS[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return package, file, name
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parents = Path(file).parts[: -node.level]
                return package, "/".join((*parents, *parts)) + ".py", name
            if parts and parts[0] in ("trl", "transformers", "peft", "align"):
                return parts[0], "/".join(parts[1:]) + ".py", name
    return None


def _computed(value: ast.expr | None) -> bool:
    """True for ``field(init=False, ...)``."""
    return isinstance(value, ast.Call) and any(
        keyword.arg == "init" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for keyword in value.keywords
    )


def _choices(value: ast.expr | None) -> tuple[Any, ...]:
    """Values listed under ``metadata={"choices": [...]}``, when they are literals."""
    for keyword in value.keywords if isinstance(value, ast.Call) else []:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, item in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices":
                    try:
                        return tuple(ast.literal_eval(item))
                    except (ValueError, TypeError):
                        return ()
    return ()


def _split_union(annotation: str) -> list[str]:
    """``dict[str, Any] | str | None`` → its members; a bar inside brackets does not split."""
    members, depth, start = [], 0, 0
    for index, char in enumerate(annotation):
        depth += (char == "[") - (char == "]")
        if char == "|" and depth == 0:
            members.append(annotation[start:index])
            start = index + 1
    return [*members, annotation[start:]]
