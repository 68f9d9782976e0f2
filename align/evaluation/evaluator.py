"""Evaluates checkpoints on held-out prompts: generate, score, measure drift, compare, write the scorecard.

The one path that the ``evaluate`` stage takes. Written files: ``scorecard.json`` (schema in ``scorecard.py``) and
``samples.jsonl``: one line per prompt with ``id``, ``source``, ``prompt`` (messages) and ``responses``, policy →
samples, each ``{text, tokens, finished, gold, reward, kl}`` (scores that were not asked for are absent).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from align.artifacts import Artifact
from align.evaluation.generation import Generated, OpenEngine, ResponseCache, generate_all
from align.evaluation.measure import (
    LoadedModels,
    function_values,
    heldout_losses,
    kept,
    kl_values,
    reward_values,
    shape_values,
)
from align.evaluation.pairs import score_pairs
from align.evaluation.prompts import Policy
from align.evaluation.scorecard import Measurements, Resampling, Values, build
from align.fingerprint import digest
from align.rollouts.protocol import Sampling
from align.stage import StageContext

Row = dict[str, Any]
SAMPLE_FIELDS = ("gold", "reward", "kl")
SAMPLER_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""Largest mean |sampler - policy| log-probability per token, in nats: above it the engine holds other weights."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated on what; ``scorer`` and ``reward`` may be absent, ``pairs`` and ``heldout`` empty."""

    policies: list[Policy]
    reference: str
    base: str | None
    rows: list[Row]
    prompts: dict[str, list[list[int]]]
    sampling: Sampling
    scorer: Any
    scorer_identity: str
    reward: Artifact | None
    pairs: list[Row]
    heldout: list[Row]
    heldout_length: int
    precision: Literal["bfloat16", "float32"]
    resampling: Resampling


def evaluate(context: StageContext, plan: Plan, open_engine: OpenEngine) -> tuple[dict[str, Any], dict[str, Generated]]:
    """Run the plan and return the scorecard and the responses; files of earlier attempts are gone on from."""
    generated = generate_all(
        plan.policies,
        plan.prompts,
        plan.sampling,
        context.runtime,
        open_engine,
        ResponseCache(context.checkpoints),
        lambda done, total: context.progress(done, total, unit="responses"),
        context.warn,
    )
    values = {name: shape_values(one) for name, one in generated.items()}
    if plan.scorer is not None:
        for name, one in generated.items():
            values[name]["gold"] = function_values(plan.scorer, plan.rows, one)
    accuracy = _score_by_model(context, plan, generated, values) if plan.reward is not None else None
    heldout = _measure_models(context, plan, generated, values)
    found = Measurements(
        policies=[policy.name for policy in plan.policies],
        reference=plan.reference,
        base=plan.base,
        sources=[str(row["source"]) for row in plan.rows],
        values=values,
        heldout=heldout,
    )
    card = build(found, plan.resampling, accuracy, _settings(context, plan, generated))
    _write(context.output, plan, card, generated, values)
    return card, generated


def _score_by_model(
    context: StageContext, plan: Plan, generated: dict[str, Generated], values: dict[str, dict[str, Values]]
) -> dict[str, Any] | None:
    """Reward-model scores of every response, and the model's accuracy on the held-out pairs if there are any."""
    from align.models.reward import RewardModel
    from align.models.threads import device_of

    artifact = plan.reward
    assert artifact is not None

    @cache
    def model() -> Any:  # loaded only when a score is missing
        return RewardModel(artifact.model, device_of(context.runtime), plan.precision)

    def score(one: Generated) -> Values:
        return reward_values(model().score, plan.rows, one)

    key = artifact.record["key"]
    folder = context.checkpoints
    for at, (name, one) in enumerate(generated.items()):
        identity = digest({"reward": key, "responses": _identity(one), "precision": plan.precision})
        values[name]["reward"] = kept(folder, f"reward-{name}", identity, partial(score, one))
        context.progress(at + 1, len(generated), unit="checkpoints scored")
    if not plan.pairs:
        return None
    identity = digest({"reward": key, "pairs": [row["id"] for row in plan.pairs], "precision": plan.precision})
    accuracy: dict[str, Any] = kept(folder, "pairs", identity, lambda: score_pairs(plan.pairs, model().score))
    return {**accuracy, "stage": artifact.stage}


def _measure_models(
    context: StageContext, plan: Plan, generated: dict[str, Generated], values: dict[str, dict[str, Values]]
) -> dict[str, tuple[list[float], list[int]]]:
    """KL to the reference and held-out loss, by the checkpoints' own forward passes."""
    from align.models.threads import device_of

    models = LoadedModels(plan.policies, plan.reference, device_of(context.runtime), plan.precision)
    losses: dict[str, tuple[list[int], list[float], list[int]]] = {}
    for at, policy in enumerate(plan.policies):
        values[policy.name] |= _kl(context, plan, models, policy, generated[policy.name])
        if plan.heldout:
            losses[policy.name] = _heldout(context.checkpoints, plan, models, policy)
        context.progress(at + 1, len(plan.policies), unit="checkpoints measured")
    return _common_rows(losses, len(plan.heldout), context)


def _kl(context: StageContext, plan: Plan, models: LoadedModels, policy: Policy, one: Generated) -> dict[str, Values]:
    """KL of one checkpoint's responses; empty where it has no meaning.

    Raises ``RuntimeError`` when the checkpoint finds its responses far less or more likely than the engine did.
    """
    temperature = plan.sampling.temperature
    reference = next(each for each in plan.policies if each.name == plan.reference)
    # Greedy responses are no sample to estimate from, and KL per token needs one vocabulary.
    if temperature == 0 or policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        return {}
    if policy is reference:
        zero = [[0.0] * len(samples) for samples in one.responses]
        return {"kl": zero, "kl_k3": zero}
    prompts = plan.prompts[policy.name]
    own, ref = (models.logprobs_of(each.name, temperature) for each in (policy, reference))
    identity = digest(["kl 2", policy.key, reference.key, _identity(one), digest(prompts), plan.precision])
    found = kept(context.checkpoints, f"kl-{policy.name}", identity, lambda: kl_values(own, ref, prompts, one))
    gap = found.pop("sampler_gap")
    exact = plan.precision == "float32" and context.runtime.engine.dtype != "bfloat16"
    tolerance = SAMPLER_TOLERANCE["float32" if exact else "bfloat16"]
    print(f"{policy.name}: sampler and policy differ by {gap:.4f} nats a token (at most {tolerance})")
    if not gap <= tolerance:
        raise RuntimeError(
            f"the {one.engine} engine and the checkpoint '{policy.name}' differ by {gap:.3f} nats a token, at most "
            f"{tolerance} was expected: the responses are not this checkpoint's. Set runtime.engine.name to "
            "transformers, and report this."
        )
    scores: dict[str, Values] = found
    return scores


def _heldout(
    folder: Path, plan: Plan, models: LoadedModels, policy: Policy
) -> tuple[list[int], list[float], list[int]]:
    """Rows, losses and tokens of one checkpoint; see :func:`heldout_losses`."""
    rows = digest([row["id"] for row in plan.heldout])
    identity = digest([policy.key, rows, plan.heldout_length, plan.precision])
    indices, losses, tokens = kept(
        folder,
        f"heldout-{policy.name}",
        identity,
        lambda: heldout_losses(
            models.logprobs_of(policy.name, 1.0), policy.tokenizer, plan.heldout, plan.heldout_length
        ),
    )
    return indices, losses, tokens


def _common_rows(
    kept_rows: dict[str, tuple[list[int], list[float], list[int]]], total: int, context: StageContext
) -> dict[str, tuple[list[float], list[int]]]:
    """Held-out rows that every checkpoint could read, so that the comparison stays paired."""
    if not kept_rows:
        return {}
    common = set.intersection(*(set(indices) for indices, _, _ in kept_rows.values()))
    if len(common) < total:
        context.warn(f"{total - len(common)} of {total} held-out rows left out: longer than max_heldout_length")
    result = {}
    for name, (indices, losses, tokens) in kept_rows.items():
        places = [at for at, index in enumerate(indices) if index in common]
        result[name] = ([losses[at] for at in places], [tokens[at] for at in places])
    return result


def _identity(generated: Generated) -> str:
    return digest([[[one.token_ids, one.finished] for one in samples] for samples in generated.responses])


def _settings(context: StageContext, plan: Plan, generated: dict[str, Generated]) -> dict[str, Any]:
    return {
        "prompts": len(plan.rows),
        "samples_per_prompt": plan.sampling.n,
        "sampling": asdict(plan.sampling),
        "precision": plan.precision,
        "engines": sorted({one.engine for one in generated.values()}),
        "seed": context.seed,
        "score": plan.scorer_identity,
        "heldout_rows": len(plan.heldout),
        "checkpoints": {policy.name: policy.key for policy in plan.policies},
        "reward_model": None if plan.reward is None else plan.reward.record["key"],
    }


def _write(
    folder: Path,
    plan: Plan,
    card: dict[str, Any],
    generated: dict[str, Generated],
    values: dict[str, dict[str, Values]],
) -> None:
    text = json.dumps(card, indent=1, allow_nan=False)
    (folder / "scorecard.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for index, row in enumerate(plan.rows):
            responses = {
                name: [
                    {"text": one.text, "tokens": len(one.token_ids), "finished": one.finished}
                    | {field: values[name][field][index][at] for field in SAMPLE_FIELDS if field in values[name]}
                    for at, one in enumerate(generated[name].responses[index])
                ]
                for name in generated
            }
            line = {"id": row["id"], "source": row["source"], "prompt": row["prompt"], "responses": responses}
            file.write(json.dumps(line) + "\n")
