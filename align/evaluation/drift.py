"""How far a system has moved from the reference: KL on its own answers, and loss on held-out ones.

The checkpoints' own forward passes; results are kept under what they depend on. Left out: tasks that read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from align.data.rows import is_finished
from align.evaluation.generation import Generated
from align.evaluation.measure import LoadedModels, Results, heldout_losses, kl_values
from align.evaluation.plan import Plan
from align.evaluation.systems import System
from align.evaluation.tasks.base import Values
from align.pipeline.context import StageContext
from align.store.fingerprint import digest

SAMPLER_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""Largest mean |sampler - policy| log-probability per token, in nats: above it the engine holds other weights."""


def measure_drift(
    context: StageContext,
    plan: Plan,
    generated: dict[str, Generated],
    values: dict[str, dict[str, Values]],
    models: LoadedModels,
    results: Results,
) -> dict[str, list[list[float]]]:
    """KL to the reference of every system that has a distribution; returns it token by token, for samples."""
    found: dict[str, list[list[float]]] = {}
    for at, system in enumerate(plan.systems):
        if system.name in generated and system.info.role != "best_of":
            measured = _kl(context, plan, models, system, generated[system.name], results)
            token_kl = measured.pop("token_kl", None)
            values[system.name] |= measured
            if token_kl:
                found[system.name] = token_kl
            context.progress(at + 1, len(plan.systems), unit="systems measured")
    return found


def _kl(
    context: StageContext, plan: Plan, models: LoadedModels, system: System, one: Generated, results: Results
) -> dict[str, Any]:
    """KL of one system's responses; empty where it has no meaning.

    Raises ``RuntimeError`` when the checkpoint finds its responses far less or more likely than the engine did.
    """
    temperature = plan.sampling.temperature
    reference = next(each for each in plan.systems if each.name == plan.reference)
    policy = system.policy
    # Greedy responses are no sample to estimate from, and KL per token needs one vocabulary.
    if temperature == 0 or policy.tokenizer.get_vocab() != reference.policy.tokenizer.get_vocab():
        return {}
    if system is reference:
        zero = [[0.0] * len(samples) for samples in one.responses]
        return {"kl": zero, "kl_k3": zero}
    prompts, ref_prompts = plan.prompts[system.name], plan.prompts[plan.reference]
    own, ref = (models.logprobs_of(each.policy.name, temperature) for each in (system, reference))
    key = digest(
        {
            "what": "kl 4",
            "policy": policy.key,
            "reference": reference.policy.key,
            "prompts": [prompts, ref_prompts],
            "responses": _tokens(one),
            "temperature": temperature,
            "precision": plan.precision,
        }
    )
    found: dict[str, Any] = results.read_or_compute(
        f"kl-{system.name}", key, lambda: kl_values(own, ref, prompts, one, ref_prompts)
    )
    gap = found.pop("sampler_gap")
    exact = plan.precision == "float32" and context.runtime.engine.dtype != "bfloat16"
    tolerance = SAMPLER_TOLERANCE["float32" if exact else "bfloat16"]
    print(f"{system.name}: sampler and policy differ by {gap:.4f} nats a token (at most {tolerance})")
    if not gap <= tolerance:
        raise RuntimeError(
            f"the {one.engine} engine and the checkpoint '{policy.name}' differ by {gap:.3f} nats a token, at most "
            f"{tolerance} was expected: the responses are not this checkpoint's. Set runtime.engine.name to "
            "transformers, and report this."
        )
    return found


def measure_heldout(
    context: StageContext, plan: Plan, models: LoadedModels, results: Results
) -> dict[str, tuple[list[float], list[int]]]:
    """Held-out loss of the checkpoints as they are, over the rows that every one of them could read."""
    if not plan.heldout:
        return {}
    losses: dict[str, tuple[list[int], list[float], list[int]]] = {}
    # Ids do not determine rows: the rows themselves, as far as they are read.
    rows = digest(
        [[row["prompt"], row["completion"], is_finished(row, "completion"), row.get("tools")] for row in plan.heldout]
    )
    for policy in plan.policies:
        key = digest(["held-out loss 2", policy.key, rows, plan.heldout_length, plan.precision])
        measure = partial(
            heldout_losses, models.logprobs_of(policy.name, 1.0), policy.tokenizer, plan.heldout, plan.heldout_length
        )
        indices, values, tokens = results.read_or_compute(f"heldout-{policy.name}", key, measure)
        losses[policy.name] = indices, values, tokens
        context.progress(len(losses), len(plan.policies), unit="held-out sets read")
    common = set.intersection(*(set(indices) for indices, _, _ in losses.values()))
    if len(common) < len(plan.heldout):
        left_out = len(plan.heldout) - len(common)
        context.warn(f"{left_out} of {len(plan.heldout)} held-out rows left out: longer than max_heldout_length")
    result = {}
    for name, (indices, values, tokens) in losses.items():
        places = [at for at, index in enumerate(indices) if index in common]
        result[name] = ([values[at] for at in places], [tokens[at] for at in places])
    return result


def _tokens(generated: Generated) -> list[Any]:
    """Responses as far as KL and ``sampler_gap`` depend on them. Log-probabilities as text: one may be NaN."""
    return [[[one.token_ids, repr(one.logprobs)] for one in samples] for samples in generated.responses]
