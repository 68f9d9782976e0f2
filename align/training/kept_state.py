"""Keep a trainer's state in a finished stage's artifact, and begin a stage from the state of another.

``state/`` of an artifact has the files that a resumed stage reads from a checkpoint, the rows trained on
(``row_history.py``) and ``state.json``. A stage with ``continue_from`` gets it as its checkpoint and resumes. So it
becomes what the other stage would have been with more steps: same start, reference, order and random numbers.

transformers writes optimizer, scheduler and random states with pickle, which an artifact must not hold: artifacts come
from other machines and buckets. ``pack`` turns these files into ``trainer.safetensors`` and ``trainer.json``, and
``unpack`` writes them again. All other files of a checkpoint are safetensors and JSON already.

Under ``scheduler: wsd`` the state from before the decay is kept, as in MiniCPM (arXiv 2404.06395): a continued stage
runs these steps again at the full rate.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from align.config.stages.continue_from import CONTINUE, LARGEST_STATE, STATE, changed_names, size_text
from align.errors import UserError, shorten, with_article
from align.pipeline.context import StageContext
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.training.checkpoints import MARKER, link, mark_complete
from align.training.row_history import FACTS, Continuation, RowHistory, StateFacts, digests_of

STABLE = "stable"
"""Folder for the checkpoint from before the decay of ``wsd``, next to the other checkpoints."""
DRAFT = ".continued"


def continued_state(context: StageContext) -> Path | None:
    """Return the folder of the state that the stage continues from; None without ``continue_from``.

    Raises ``UserError`` if the other stage kept no state.
    """
    if context.config.continue_from is None:
        return None
    parent = context.artifact("continue_from")
    folder = parent.path / STATE
    if not (folder / FACTS).is_file():
        raise UserError(
            f"{context.name}: '{parent.stage}' kept no trainer's state to continue from. "
            f"`--rebuild {parent.stage}` runs it again and keeps it."
        )
    return folder


def continued_facts(context: StageContext) -> StateFacts | None:
    """Return the facts of the state that the stage continues from; None without ``continue_from``."""
    folder = continued_state(context)
    if folder is None:
        return None
    try:
        return read_sealed(folder / FACTS, StateFacts)
    except DamagedFile as error:
        raise UserError(f"{folder / FACTS} {error}. Rebuild that stage.") from None


def continued_history(context: StageContext) -> RowHistory | None:
    """Return the rows of the stage that this stage continues; None without ``continue_from``."""
    folder = continued_state(context)
    facts = continued_facts(context)
    return None if folder is None or facts is None else RowHistory.load(folder, facts.start)


def continue_order(
    context: StageContext,
    rows: Iterable[Mapping[str, Any]],
    noun: str,
    shuffle: Callable[[list[int]], list[int]],
    position: Callable[[int], int],
) -> Continuation | None:
    """Return the order of the rows if a stage continues with other rows; None for the plain order.

    The same rows keep their order, which is the plain one unless the other stage had continued with other rows itself.

    Args:
        noun: The word for rows in the note.
        shuffle: Returns the indices of the rows that were never trained on in a random order.
        position: Returns the position in the endless sequence of passes after a number of steps.
    """
    history = continued_history(context)
    facts = continued_facts(context)
    if history is None or facts is None:
        return None
    digests = digests_of(rows)
    if history.is_same(digests):
        return Continuation(history.first, history.start) if history.start else None
    first = history.untrained(digests)
    context.note(
        f"{context.name}: {len(first)} of {len(digests)} {noun} are new to "
        f"'{context.artifact('continue_from').stage}' and come first"
    )
    return Continuation(shuffle(first), position(facts.steps))


Adapt = Callable[[Path, frozenset[str]], None]


def restore_checkpoint(context: StageContext, adapt: Adapt, steps_per_point: int = 1) -> Path | None:
    """Write the state that the stage continues from as a complete checkpoint, and return the checkpoint.

    Returns None without ``continue_from``. Call it in one process.

    Args:
        adapt: Gets the draft of the checkpoint and the names of the settings that change, if there are any.
        steps_per_point: Optimizer steps of a point of the stage's curves.
    """
    folder = continued_state(context)
    facts = continued_facts(context)
    if folder is None or facts is None:
        return None
    draft = context.checkpoints / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for file in folder.iterdir():
        if is_read_on_resuming(file.name):
            link(file, draft / file.name)
    try:
        unpack(folder, draft)
    except (UnknownState, KeyError, ValueError) as error:
        raise UserError(f"{context.name}: the state in {folder} cannot be read: {error}. Rebuild that stage.") from None
    changed = changed_names(context.config)
    if changed:
        adapt(draft, changed)
    # The marker is written before the rename, so the checkpoint is complete as soon as it has its name.
    mark_complete(draft)
    checkpoint = context.checkpoints / f"checkpoint-{facts.steps}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    draft.rename(checkpoint)
    context.note(f"{context.name} continues '{context.artifact(CONTINUE).stage}' after step {facts.steps}")
    if changed:
        changes = change_facts(context)["changed"]
        text = ", ".join(f"{name} {values}" for name, values in changes.items())
        context.emit("change", step=facts.steps // steps_per_point, text=text)
        context.note(f"{context.name}: other settings after step {facts.steps}: {text}")
    return checkpoint


def change_facts(context: StageContext) -> dict[str, Any]:
    """Return the settings that a stage changes on continuing another, as a metric; empty if there are none."""
    changed = changed_names(context.config)
    before = context.artifact(CONTINUE).record.get("config", {}) if changed else {}
    after = context.config.model_dump(mode="json")
    changes = {name: f"{_shown(before.get(name))} → {_shown(after[name])}" for name in sorted(changed)}
    return {"changed": changes} if changes else {}


def _shown(value: Any) -> str:
    return shorten(value if isinstance(value, str) else json.dumps(value))


def refuse_no_steps(context: StageContext, steps: int, unit: str = "steps", per_unit: int = 1) -> None:
    """Raise ``UserError`` if a continued stage has no optimizer step left of ``steps`` in all.

    ``unit`` is the word for ``per_unit`` steps in the message.
    """
    facts = continued_facts(context)
    if facts is None or steps > facts.steps:
        return
    parent = context.artifact("continue_from").stage
    field = "updates" if unit == "updates" else "max_steps or epochs"
    limit = ""
    if unit == "steps" and context.config.max_steps is not None:
        limit = f" (max_steps {context.config.max_steps} limits epochs; `max_steps: null` lifts it)"
    total = steps // per_unit
    trained = facts.steps // per_unit
    raise UserError(
        f"{context.name} is to end after {total} {unit}, and '{parent}' has done {trained}. They are "
        f"counted from the start of '{parent}'. Raise {field}{limit}."
    )


class OwnSettings(TrainerCallback):
    """Replaces the other stage's settings in the state by the continued stage's own.

    The optimizer has the rate that the other stage would have used next, 0 after the end of a cosine; and the Trainer
    reads the steps between checkpoints from the state that it resumes from.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, args.max_steps)
        scheduler = kwargs["lr_scheduler"]
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
        if not isinstance(scheduler, LambdaLR):
            return
        # The product that LambdaLR itself computes after a step, so equal schedules give equal bits.
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        # The only public way to set the rates that ``get_last_lr`` returns until the next step.
        scheduler.load_state_dict(scheduler.state_dict() | {"_last_lr": rates})


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint; its only folder has further chat templates, which resuming does not read."""
    return [file for file in checkpoint.iterdir() if file.is_file()]


def _files_to_keep(checkpoint: Path) -> list[Path]:
    return [file for file in files_of(checkpoint) if is_read_on_resuming(file.name) and file.name != MARKER]


def _state_size(checkpoint: Path) -> int:
    """Return the bytes of the state in a checkpoint."""
    files = [*_files_to_keep(checkpoint), *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return sum(file.stat().st_size for file in files)


def is_too_large(context: StageContext, checkpoint: Path) -> bool:
    """Return True if ``runtime.keep_state: auto`` skips the state of a checkpoint for its size."""
    return context.runtime.keep_state == "auto" and _state_size(checkpoint) > LARGEST_STATE


def keep_state(
    context: StageContext,
    checkpoint: Path | None,
    *,
    steps: int,
    warmup_steps: int,
    rows: Iterable[Mapping[str, Any]],
    continuation: Continuation | None,
    passed: Callable[[int], Iterable[int]],
) -> int:
    """Write ``state/`` of the artifact from a complete checkpoint, as ``runtime.keep_state`` says.

    Call it in one process.

    Args:
        checkpoint: The checkpoint with the state after ``steps`` steps.
        rows: The rows that the stage trains on, in the order of ``continuation``.
        passed: Called if the state is kept, with the position at which the order began; returns the rows since then.

    Returns:
        The bytes of its tensors; 0 if no state is kept, with a note of the reason.
    """
    keep = context.runtime.keep_state
    if keep is False:
        return 0
    if checkpoint is None:
        context.note(f"{context.name} keeps no trainer's state: it wrote no checkpoint to continue from")
        return 0
    files = _files_to_keep(checkpoint)
    if is_too_large(context, checkpoint):
        context.note(
            f"{context.name} keeps no trainer's state, which would need {size_text(_state_size(checkpoint))}, so no "
            "stage can continue it; `runtime: {keep_state: true}` keeps it"
        )
        return 0
    folder = context.output / STATE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        pack(checkpoint, folder)
    except UnknownState as error:
        shutil.rmtree(folder)
        context.warn(f"{context.name} keeps no trainer's state: {error}, which safetensors and JSON cannot hold.")
        return 0
    for file in files:
        link(file, folder / file.name)
    start = 0 if continuation is None else continuation.start
    before = continued_history(context)
    digests = digests_of(rows)
    # The rows of the stages that this stage continues count as trained on.
    trained = {digests[row] for row in passed(start)} | (set() if before is None else before.trained)
    RowHistory(digests, trained, [] if continuation is None else continuation.first, start).save(folder)
    # This file is written last, because the state counts as kept only with it.
    write_sealed(folder / FACTS, StateFacts(steps=steps, warmup_steps=warmup_steps, start=start).model_dump())
    # Count only the tensors: other files hold times, so their sizes differ from run to run.
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


TENSORS = "trainer.safetensors"
STRUCTURE = "trainer.json"
PICKLED = (".pt", ".pth")
"""Suffixes of the files that transformers writes with pickle."""
LEFT_OUT = (".bin", ".jinja", ".md", ".txt", ".model")
"""Suffixes of files that are not read on resuming: arguments, tokenizer, notes."""
TOKENIZER = ("tokenizer", "special_tokens", "vocab", "added_tokens", "merges", "preprocessor", "processor")
"""Beginnings of a tokenizer's files, which a stage reads from its own model."""


class UnknownState(Exception):
    """An optimizer's state has a value that neither JSON nor safetensors can hold."""


def is_read_on_resuming(name: str) -> bool:
    """Return True for a file of a checkpoint that resuming reads, except for the pickled files."""
    if name == "training_seconds.txt":
        return True
    return Path(name).suffix not in (*PICKLED, *LEFT_OUT) and not name.startswith(TOKENIZER)


def pack(checkpoint: Path, folder: Path) -> None:
    """Write the pickled files of ``checkpoint`` to ``folder`` as tensors and JSON. Raises ``UnknownState``."""
    tensors: dict[str, torch.Tensor] = {}
    structure = {}
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in PICKLED:
            with safe_globals():
                # Map the file: AdamW's state is twice the model's size, and it is written page by page.
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            structure[file.name] = _encode(content, file.stem, tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    (folder / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")


def unpack(folder: Path, checkpoint: Path) -> None:
    """Write the files that ``pack`` read, with equal content, to ``checkpoint``."""
    structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    with safe_open(folder / TENSORS, "pt") as tensors:
        for name, content in structure.items():
            # The names come from an artifact and must not lead out of the checkpoint's folder.
            if Path(name).name != name or Path(name).suffix not in PICKLED:
                raise UnknownState(f"{folder / STRUCTURE} names {name!r}, which is not a file of a checkpoint")
            torch.save(_decode(content, tensors), checkpoint / name)


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return ``value`` as JSON, with tensors moved to ``tensors`` under their places."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[place] = _separate(value.detach().contiguous(), tensors)
        return {"tensor": place}
    if isinstance(value, np.ndarray):
        # numpy's random state is an array of uint32. Every value fits into int64.
        tensors[place] = torch.from_numpy(value.astype(np.int64))
        return {"array": place, "type": value.dtype.name}
    if isinstance(value, list):
        return [_encode(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": _encode(list(value), place, tensors)}
    if isinstance(value, dict):
        # Pairs, not an object: an optimizer's keys are numbers, which JSON would make texts.
        return {"items": [[key, _encode(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    raise UnknownState(f"{place} is {with_article(type(value).__name__)}")


def _separate(value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return ``value`` in unshared memory, which safetensors requires; it is copied only if it shares memory."""
    is_part = value.untyped_storage().nbytes() != value.nbytes
    is_shared = any(value.data_ptr() == tensor.data_ptr() for tensor in tensors.values())
    return value.clone() if is_part or is_shared else value


def _decode(value: Any, tensors: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors.get_tensor(value["tensor"])
    if "array" in value:
        return tensors.get_tensor(value["array"]).numpy().astype(value["type"])
    if "tuple" in value:
        return tuple(_decode(value["tuple"], tensors))
    return {key: _decode(item, tensors) for key, item in value["items"]}
