"""Check a stage's input checkpoints before anything is loaded, and its own checkpoint before it is published.

The stage's process calls this for every stage. Files that changed since their record was written are not checked here:
the runner finds them first (``Store.problems``). The last check of a folder, that the template ends a turn with eos,
renders a conversation with transformers' tokenizer. It is skipped if ``align.json`` records it for the same template
and tokenizer. All other checks are torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.checks.facts import (
    HEAD,
    WIDTHS,
    Damaged,
    Facts,
    Fault,
    Tensor,
    all_zero,
    facts_of,
    head_of,
    not_finite,
    read_facts,
    read_json,
    read_tensors,
    refuse,
    special_token,
    template_text,
    tensor_digest,
    token_ids,
    tokenizer_digest,
    weights_digest,
    write_base_digest,
    write_facts,
)
from align.config.stages.continue_from import CONTINUE
from align.errors import UserError
from align.evaluation.statistics import wilson
from align.models.chat.template_settings import TemplateSettings, template_state
from align.pipeline.context import StageContext
from align.store.artifacts import GENERATORS, Artifact, Kind

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
ADAPTER = "adapter"
"""Folder inside a model folder, with an adapter that cannot be merged and works on the weights next to it."""
CHECKPOINTS = (*GENERATORS, Kind.REWARD)
RENDERED = ("policy", "policies", "model", "judge_model")
"""Inputs whose chat template a stage with the field ``thinking`` sets."""
TRAINED = (Kind.POLICY, Kind.REWARD)


def check_folder(folder: Path, reward: bool, *, values: bool = True) -> list[Fault]:
    """Return every fault of a checkpoint's folder, which should be a reward model if ``reward``.

    ``values`` reads all weights for NaN and infinity, about two seconds per GiB; without it only headers are read.
    """
    place = str(folder)
    try:
        tensors = read_tensors(folder)
    except Damaged as error:
        return [Fault("weights-truncated", place, str(error))]
    config = read_json(folder / "config.json")
    if not config:
        return [Fault("weights-truncated", place, "has no config.json that can be read")]
    wrong_kind = _kind(place, config, reward)
    # A model of the wrong kind would also fail the other checks.
    if wrong_kind:
        return wrong_kind
    facts = read_facts(folder)
    faults = [
        *_values(place, tensors, values),
        *_vocabulary(folder, config, tensors),
        *(_head(place, tensors, facts) if reward else []),
        *_adapter(folder, tensors, facts),
        *_changes(folder, facts),
        *_special_tokens(folder),
    ]
    # Rendering is slow and misleading with a wrong template or tokenizer.
    if not any(fault.name in ("pad-is-eos", "template-changed", "tokenizer-changed") for fault in faults):
        faults += _turn_end(folder, facts)
    return faults


def _kind(place: str, config: dict[str, Any], reward: bool) -> list[Fault]:
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if not kinds:
        return []
    scores = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    if scores != reward:
        expected = "a reward model" if reward else "a generative model"
        return [Fault("wrong-kind", place, f"should be {expected} and its config says {kinds[0]}")]
    labels = len(config.get("id2label") or {}) or 1
    if reward and labels != 1:
        return [Fault("wrong-kind", place, f"is a classifier with {labels} labels, where a reward model has one score")]
    return []


def _values(place: str, tensors: dict[str, Tensor], values: bool) -> list[Fault]:
    unsupported = next((tensor for tensor in tensors.values() if tensor.dtype not in WIDTHS and tensor.size > 1), None)
    if unsupported is not None:
        return [Fault("weights-dtype", place, f"has the tensor {unsupported.name} of type {unsupported.dtype}")]
    not_finite_name = not_finite(tensors) if values else None
    return (
        []
        if not_finite_name is None
        else [Fault("weights-not-finite", place, f"has NaN or infinity in {not_finite_name}")]
    )


def _vocabulary(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Fault]:
    ids = token_ids(folder)
    tokens = max(ids.values()) + 1 if ids else 0
    # Embedding and head have one row per token.
    matrices = [tensor for name, tensor in tensors.items() if name.endswith((*EMBEDDINGS, HEAD))]
    vocab_size = (config.get("text_config") or config).get("vocab_size")
    for tensor in matrices:
        if tokens > tensor.shape[0]:
            problem = f"has a tokenizer of {tokens} tokens and {tensor.shape[0]} rows in {tensor.name}"
            return [Fault("vocabulary-size", str(folder), problem)]
        if isinstance(vocab_size, int) and vocab_size != tensor.shape[0]:
            problem = f"has {tensor.shape[0]} rows in {tensor.name} and a vocab_size of {vocab_size} in its config"
            return [Fault("vocabulary-size", str(folder), problem)]
    return []


def _head(place: str, tensors: dict[str, Tensor], facts: Facts | None) -> list[Fault]:
    head = head_of(tensors)
    # transformers fills a missing head with random numbers and only warns.
    if head is None:
        return [Fault("score-head", place, "has no score head, and a random one would be put there")]
    if head.dtype in WIDTHS and all_zero(head):
        return [Fault("score-head", place, f"has a score head of zeros ({head.name}): it was never trained")]
    if facts is not None and facts.head is not None and tensor_digest(head) != facts.head:
        return [Fault("score-head", place, "has another score head than the trained one: a random one replaced it")]
    return []


def _adapter(folder: Path, tensors: dict[str, Tensor], facts: Facts | None) -> list[Fault]:
    """Check that a stored adapter is intact and was trained on the weights next to it."""
    if not (folder / ADAPTER).is_dir():
        return []
    try:
        not_finite_name = not_finite(read_tensors(folder / ADAPTER))
    except Damaged as error:
        return [Fault("weights-truncated", str(folder / ADAPTER), str(error))]
    if not_finite_name is not None:
        return [Fault("weights-not-finite", str(folder / ADAPTER), f"has NaN or infinity in {not_finite_name}")]
    if facts is None or facts.adapter_base is None:
        return []
    if weights_digest(tensors) == facts.adapter_base:
        return []
    return [Fault("adapter-base", str(folder / ADAPTER), "was trained on other weights than those beside it")]


def _changes(folder: Path, facts: Facts | None) -> list[Fault]:
    if facts is None:
        return []
    faults: list[Fault] = []
    text = template_text(folder)
    if facts.template is not None and (text is None or hashlib.sha256(text.encode()).hexdigest() != facts.template):
        faults.append(Fault("template-changed", str(folder), "has another chat template than it was trained with"))
    if facts.tokenizer is not None and tokenizer_digest(folder) != facts.tokenizer:
        faults.append(Fault("tokenizer-changed", str(folder), "has another tokenizer than it was trained with"))
    for name, trained_with in (("eos_token", facts.eos), ("pad_token", facts.pad)):
        current = special_token(folder, name)
        if current != trained_with:
            faults.append(
                Fault("tokenizer-changed", str(folder), f"has {name} {current!r}; it was trained with {trained_with!r}")
            )
    return faults


def _special_tokens(folder: Path) -> list[Fault]:
    pad = special_token(folder, "pad_token")
    eos = special_token(folder, "eos_token")
    if pad is not None and pad == eos:
        problem = f"pads with its end of turn, {eos!r}: masked as padding, the end of an answer is never learned"
        return [Fault("pad-is-eos", str(folder), problem)]
    ids = token_ids(folder)
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    if ends is None:
        return []
    # A generation config may name one token or several.
    ends = ends if isinstance(ends, list) else [ends]
    if eos is not None and eos in ids and ends and ids[eos] not in ends:
        problem = f"stops at the tokens {ends} and its tokenizer's eos is {eos!r} ({ids[eos]})"
        return [Fault("eos-not-turn-end", str(folder), problem)]
    return []


def _turn_end(folder: Path, facts: Facts | None) -> list[Fault]:
    if template_text(folder) is None or (facts is not None and facts.turn_end):
        return []
    from jinja2 import TemplateError

    from align.models.chat.special_tokens import turn_end_token
    from align.models.pretrained import open_tokenizer

    tokenizer = open_tokenizer(folder)
    try:
        end = turn_end_token(tokenizer)
    except TemplateError:  # it expects other roles; rendering the rows will show it
        return []
    if end is None or end == tokenizer.eos_token_id:
        return []
    token = tokenizer.convert_ids_to_tokens(end)
    problem = f"ends turns with {token!r}, and its eos is {tokenizer.eos_token!r}: answers would never stop"
    return [Fault("eos-not-turn-end", str(folder), problem)]


def check_inputs(context: StageContext, makes: Kind | None) -> None:
    """Check every input checkpoint of the stage. Raises ``UserError`` that names each fault.

    ``makes`` is the stage's kind of result: models that are trained together need one template and one vocabulary.
    """
    models = input_checkpoints(context)
    faults: list[Fault] = []
    for _, artifact in models:
        # Most weights were checked for NaN before they were published.
        facts = read_facts(artifact.model)
        is_verified = facts is not None and facts.finite
        faults += check_folder(artifact.model, artifact.kind == Kind.REWARD, values=not is_verified)
    if not faults and makes in TRAINED:
        faults = [*_unlike(context.config, models), *below_floor(context.config, models, context.warn)]
    faults += _other_thinking(context.config, models)
    refuse(context.name, faults, context.runtime.handover.waive)


def input_checkpoints(context: StageContext) -> list[tuple[str, Artifact]]:
    """Return config field and artifact of every model among the inputs.

    The stage that this stage continues is skipped, because only its trainer's state is read.
    """
    models = []
    for name, value in context.inputs.items():
        if name == CONTINUE:
            continue
        for artifact in value if isinstance(value, list) else [value]:
            if isinstance(artifact, Artifact) and artifact.kind in CHECKPOINTS:
                models.append((name, artifact))
    return models


def _unlike(config: Any, models: list[tuple[str, Artifact]]) -> list[Fault]:
    """Return faults of models whose token ids are combined: all generators, and a reward model that starts a critic."""
    critic = getattr(config, "critic_source", None)
    # A teacher whose text is aligned has a vocabulary of its own.
    aligned = {block.stage for block in getattr(config, "teachers", ()) if block.tokens == "aligned"}
    models = [
        (field, artifact) for field, artifact in models if field != "teacher.stage" or artifact.stage not in aligned
    ]
    combined = [
        (field, artifact)
        for field, artifact in models
        if artifact.kind in GENERATORS or (critic == "reward" and not field.startswith("score."))
    ]
    if len(combined) < 2:
        return []
    # Compare all models with the first model.
    (first_field, first), rest = combined[0], combined[1:]
    faults = []
    for field, artifact in rest:
        fields = f"{field} ('{artifact.stage}') and {first_field} ('{first.stage}')"
        if token_ids(artifact.model) != token_ids(first.model):
            faults.append(Fault("tokenizer-changed", fields, "give tokens different ids"))
        elif template_text(artifact.model) != template_text(first.model):
            faults.append(Fault("template-changed", fields, "have different chat templates"))
    return faults


def _other_thinking(config: Any, models: list[tuple[str, Artifact]]) -> list[Fault]:
    """Return the faults of policies that were trained with thoughts, or without, and that a stage samples otherwise."""
    if not hasattr(config, "thinking"):
        return []
    faults = []
    for field, artifact in models:
        if field not in RENDERED:
            continue
        facts = read_facts(artifact.model)
        state = TemplateSettings.of(config.judge if field == "judge_model" else config).thinking_state
        if state is None or facts is None or facts.thoughts is None or facts.thoughts == (state == "on"):
            continue
        trained = "with" if facts.thoughts else "without"
        problem = f"('{artifact.stage}') was trained {trained} thoughts, and this stage turns thinking {state}"
        faults.append(Fault("thinking-changed", field, problem))
    return faults


def check_output(context: StageContext, kind: str, makes: Kind | None, metrics: dict[str, Any]) -> None:
    """Check the stage's own checkpoint and record its facts.

    Raises ``UserError`` that names each fault, such as a score head of zeros.
    """
    folder = context.output / "model"
    if makes not in CHECKPOINTS or not folder.is_dir() or folder.is_symlink():
        return
    faults = check_folder(folder, makes == Kind.REWARD)
    _refuse_untrained(context, faults, metrics)
    refuse(f"{context.name}, of its own result", faults, context.runtime.handover.waive)
    # Record facts after the checks, so a checkpoint with faults that were not waived has no record.
    tensors = read_tensors(folder)
    if kind == "artifact" and read_facts(folder) is not None:
        return  # an imported artifact keeps its facts
    base = weights_digest(tensors) if (folder / ADAPTER).is_dir() else None
    sources = [read_facts(artifact.model) for _, artifact in input_checkpoints(context) if artifact.kind in GENERATORS]
    thoughts = next((facts.thoughts for facts in sources if facts is not None), None)
    template = template_text(folder)
    if thoughts is None and template is not None and hasattr(context.config, "rollout_batch"):
        # An RL stage has trained on its own answers, which have thoughts if the template asks for them.
        state = template_state(template)
        thoughts = None if state is None else state == "on"
    facts = facts_of(folder, kind, tensors, metrics, verified=not faults, thoughts=thoughts, adapter_base=base)
    write_facts(folder, facts)
    _record_base(context)


def _refuse_untrained(context: StageContext, faults: Sequence[Fault], metrics: dict[str, Any]) -> None:
    """Raise ``UserError`` with the causes of a score head that learned nothing, if the stage's metrics have some."""
    causes = [metrics["untrained"]] if "untrained" in metrics else []
    causes += metrics.get("skipped_rows", [])
    is_refused = "score-head" not in context.runtime.handover.waive
    if causes and is_refused and any(fault.name == "score-head" for fault in faults):
        raise UserError(
            f"{context.name} cannot be trained like this: its score head is still zeros, since {'; '.join(causes)}."
        )


def _record_base(context: StageContext) -> None:
    """Record the base of the bare adapter that some stages write, to be checked when it is merged."""
    folder = context.output / "adapter"
    sources = [artifact for _, artifact in input_checkpoints(context) if artifact.kind in GENERATORS]
    if folder.is_dir() and sources:
        write_base_digest(folder, sources[0].model)


def below_floor(config: Any, models: list[tuple[str, Artifact]], warn: Callable[[str], None]) -> list[Fault]:
    """Return reward models whose 95 % interval (Wilson) on held-out pairs is not above ``config.reward_floor``.

    A policy follows whatever a reward model prefers, also when that is noise. A config without that field uses no
    reward model. A reward model without a recorded accuracy causes a warning.
    """
    floor = getattr(config, "reward_floor", None)
    if floor is None:
        return []
    faults = []
    for field, artifact in models:
        if artifact.kind != Kind.REWARD:
            continue
        facts = read_facts(artifact.model)
        if facts is None or facts.accuracy is None or not facts.pairs:
            warn(
                f"reward_floor is {floor:g}, and no accuracy of '{artifact.stage}' on held-out pairs is recorded; "
                "an evaluate stage with `pairs` measures it."
            )
            continue
        # The interval, not the estimate, must be above the floor: few pairs prove little.
        estimate = wilson(facts.accuracy * facts.pairs, facts.pairs)
        if estimate.low <= floor:
            problem = (
                f"('{artifact.stage}') orders {facts.accuracy:.3f} of {facts.pairs} held-out pairs as labeled, "
                f"interval [{estimate.low:.3f}, {estimate.high:.3f}], which is not above reward_floor {floor:g}"
            )
            faults.append(Fault("reward-floor", field, problem))
    return faults
