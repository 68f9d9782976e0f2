"""Methods of our own on their way into a model, out of it and back: applied, folded or stored, and loaded again.

What ordinary weights can hold is folded into them (``virtual_tokens``, a parallel ``bottleneck``). The rest stays
beside the frozen model: ``model/adapter/`` holds ``adapter.json``, which says what was inserted, and
``adapter.safetensors``. Without it, ``model/`` is the model as it was before, which must not be taken for the trained
one; the loaders here never do.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from align.config.tuning import AdaptersTuning, FullTuning, PrefixTuning, PromptTuning, PTuning, Tuning
from align.errors import UserError
from align.models.tuning import bottleneck, llama_adapter, prefix, virtual_tokens
from align.models.tuning.inserted import inserted_weights, insertions, train_insertions_only

FOLDER, DESCRIPTION, WEIGHTS = "adapter", "adapter.json", "adapter.safetensors"
FORMAT = 1

Inserted = PrefixTuning | PromptTuning | PTuning | AdaptersTuning


def is_stored(model_dir: Path) -> bool:
    """Whether the checkpoint keeps an adapter of ours beside its weights."""
    return (model_dir / FOLDER / DESCRIPTION).is_file()


def stored_tuning(model_dir: Path) -> Inserted:
    """What was inserted into the checkpoint. ``UserError`` for a description that cannot be read."""
    from pydantic import TypeAdapter, ValidationError

    file = model_dir / FOLDER / DESCRIPTION
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']}, this version reads {FORMAT}")
        tuning: Any = TypeAdapter(Tuning).validate_python(found["tuning"])
        assert isinstance(tuning, Inserted)
        assert not isinstance(tuning, PrefixTuning) or int(found["first_token"]) >= 0
        return tuning
    except (OSError, ValueError, KeyError, TypeError, AssertionError, ValidationError) as error:
        raise UserError(f"{file} does not describe an adapter: {error}. The checkpoint is damaged.") from None


def tokenizer_for(tokenizer: Any, model_dir: Path, tuning: Any) -> Any:
    """``tokenizer`` of the checkpoint as ``tuning`` trains it: with its virtual tokens, if it has any."""
    if not isinstance(tuning, PrefixTuning | PromptTuning | PTuning):
        return tokenizer
    if is_stored(model_dir):  # training goes on with the tokens there are
        stored = stored_tuning(model_dir)
        if isinstance(stored, PrefixTuning):
            tokenizer.new_virtual_tokens = [_first_token(model_dir) + at for at in range(stored.tokens)]
        return tokenizer
    return virtual_tokens.extend_tokenizer(tokenizer, tuning)


def apply(model: Any, tuning: Inserted, seed: int, tokenizer: Any) -> Any:
    """``model`` with what ``tuning`` inserts, and nothing else trained.

    Insertions that came with the checkpoint are trained further by the same tuning, and refused for any other.
    """
    if getattr(model, "inserted_tuning", None) is not None:
        require_same(model, tuning)
        return train_insertions_only(model, started=True)
    if isinstance(tuning, PrefixTuning):
        model = prefix.wrap(model, tuning, seed, tokenizer)
    elif isinstance(tuning, AdaptersTuning):
        family: Any = llama_adapter if tuning.kind == "llama_adapter" else bottleneck
        model = family.wrap(model, tuning, seed)
    else:
        model = virtual_tokens.wrap(model, tuning, seed, tokenizer)
    model.inserted_tuning = tuning
    return model


def require_same(model: Any, tuning: Any) -> None:
    """``UserError`` where a model with a stored adapter is to be trained in another way than by that or in full."""
    carried = getattr(model, "inserted_tuning", None)
    if carried is None or isinstance(tuning, FullTuning):
        return
    same = type(carried) is type(tuning) and carried.model_dump(exclude={"text"}) == tuning.model_dump(exclude={"text"})
    if not same:
        raise UserError(
            f"tuning.method: the checkpoint carries an adapter of tuning {carried.label}, which is trained further "
            f"by the same tuning or with method full, not by {tuning.label}. Take one of these, or start from the "
            "checkpoint before it."
        )


def insert(model: Any, tuning: Inserted, first_token: int | None) -> None:
    """Put empty insertions of ``tuning`` into ``model``, for weights to be read into."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(tuning, PrefixTuning):
            assert first_token is not None
            rows = [
                {name: torch.zeros(tuning.tokens, width) for name, width in layer.items()}
                for layer in prefix.widths(model)
            ]
            prefix.insert(model, first_token, rows)
        elif isinstance(tuning, AdaptersTuning) and tuning.kind == "llama_adapter":
            llama_adapter.insert(model, tuning)
        else:
            assert isinstance(tuning, AdaptersTuning)
            bottleneck.insert(model, tuning)
    model.inserted_tuning = tuning


def attach(model: Any, model_dir: Path) -> Any:
    """``model``, loaded from ``model_dir``, with the adapter that is stored there, if there is one.

    Raises ``UserError`` for an adapter that is damaged or of another model.
    """
    if not is_stored(model_dir):
        return model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tuning, file = stored_tuning(model_dir), model_dir / FOLDER / WEIGHTS
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. The checkpoint is damaged.") from None
    insert(model, tuning, _first_token(model_dir) if isinstance(tuning, PrefixTuning) else None)
    own = inserted_weights(model)
    odd = sorted(own.keys() ^ found.keys()) or [name for name in own if own[name].shape != found[name].shape]
    if odd:
        raise UserError(f"{file} does not fit the model beside it: {odd[0]} differs ({len(odd)} in all).")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    return model


def _first_token(model_dir: Path) -> int:
    return int(json.loads((model_dir / FOLDER / DESCRIPTION).read_text(encoding="utf-8"))["first_token"])


def write(model: Any, folder: Path) -> None:
    """Write the insertions of ``model`` and what they are to ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokens = getattr(model.get_input_embeddings(), virtual_tokens.NAME, None)
    described = {
        "format": FORMAT,
        "tuning": model.inserted_tuning.model_dump(mode="json", exclude_defaults=True)
        | {"method": model.inserted_tuning.method},
        "first_token": None if tokens is None else tokens.first,
    }
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in inserted_weights(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1), encoding="utf-8")


def weights_to_hand_over(model: Any) -> dict[str, torch.Tensor]:
    """Every weight of ``model`` by its name in what loads it: insertions folded where that is plain, by name where not.

    What an engine takes that was opened on :func:`engine_source`, and what is saved.
    """
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if virtual_tokens.prompt_of(model) is not None:
        return virtual_tokens.folded(model, weights)
    return bottleneck.folded(model, weights) if bottleneck.is_parallel(model) else weights


def settle(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, out_dir: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The plain ones of ``weights`` (``weights_to_hand_over``), and the fields of the config that go with them.

    The adapter by itself is written to ``adapter/``: beside ``out_dir`` when it is folded, in it when it is not.
    """
    if not insertions(model):
        return weights, {}
    tokens = virtual_tokens.prompt_of(model)
    if tokens is not None:
        ids = [tokens.first + at for at in range(tokens.count)]
        where = f"tuning.method: {model.inserted_tuning.method}, after training"
        virtual_tokens.require_small_mass(model, tokenizer, ids, where)
        virtual_tokens.write_peft(tokens, out_dir.parent / FOLDER, reward=hasattr(model, "score"))
        return weights, {} if model.get_output_embeddings() is None else {"tie_word_embeddings": False}
    if bottleneck.is_parallel(model):
        write(model, out_dir.parent / FOLDER)
        return weights, {"intermediate_size": bottleneck.folded_width(model)}
    write(model, out_dir / FOLDER)
    own = inserted_weights(model)
    return {name: tensor for name, tensor in weights.items() if name not in own}, {}


def engine_source(source: Path, tuning: Any, scratch: Path) -> Path:
    """The folder to open an engine on for the policy in ``source``: one with a place for all that ``tuning`` trains.

    ``source`` itself where its shapes are right; else a checkpoint of the first step, written into ``scratch``.
    """
    if not isinstance(tuning, AdaptersTuning) or is_stored(source):
        return source
    from align.models.tuning.apply import apply_tuning, load_for_tuning, save_tuned

    if not (scratch / "config.json").is_file():
        from align.models.loading import load_tokenizer

        model = apply_tuning(load_for_tuning(source, tuning), tuning, seed=0)  # all start as nothing, whatever the seed
        save_tuned(model, load_tokenizer(source), scratch)
    return scratch


@contextlib.contextmanager
def config_with(config: Any, changes: dict[str, Any]) -> Iterator[None]:
    """``config`` (or the text part of it) with other values for a while."""
    part = config.get_text_config()
    before = {name: getattr(part, name) for name in changes}
    for name, value in changes.items():
        setattr(part, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(part, name, value)
