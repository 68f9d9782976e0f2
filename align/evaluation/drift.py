"""Drift of a system from the reference: KL on its own answers, and loss on held-out answers.

Both come from the checkpoints' own forward passes, cached under a key of their inputs.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from align.data.rows import is_finished
from align.evaluation.generation import ResponseSet
from align.evaluation.measure import LoadedModels, ResultCache, heldout_losses, kl_values
from align.evaluation.plan import Plan
from align.evaluation.systems import System
from align.evaluation.tasks.base import Values
from align.pipeline.context import StageContext
from align.store.fingerprint import digest

logger = logging.getLogger(__name__)

SAMPLER_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""Largest mean |sampler - policy| log-probability per token, in nats: above it the engine holds other weights."""


class DriftMeasurement:
    """Measures the compared systems' drift with the checkpoints' forward passes."""

    def __init__(self, context: StageContext, plan: Plan, models: LoadedModels, results: ResultCache) -> None:
        self.context = context
        self.plan = plan
        self.models = models
        self.results = results

    def measure_kl(
        self, response_sets: dict[str, ResponseSet], values: dict[str, dict[str, Values]]
    ) -> dict[str, list[list[float]]]:
        """Add the KL to the reference to every system's ``values``, but for best of N; return it token by token."""
        by_system: dict[str, list[list[float]]] = {}
        for number, system in enumerate(self.plan.systems, 1):
            if system.name not in response_sets or system.info.role == "best_of":
                continue
            measured = self._kl(system, response_sets[system.name])
            token_kl = measured.pop("token_kl", None)
            values[system.name] |= measured
            if token_kl:
                by_system[system.name] = token_kl
            self.context.progress(number, len(self.plan.systems), unit="systems measured")
        return by_system

    def _kl(self, system: System, response_set: ResponseSet) -> dict[str, Any]:
        """Return the KL of one system's responses; empty where it has no meaning.

        Raises ``RuntimeError`` where the checkpoint's log-probabilities differ too much from the engine's.
        """
        plan = self.plan
        temperature = plan.sampling.temperature
        reference = next(candidate for candidate in plan.systems if candidate.name == plan.reference)
        policy = system.policy
        # Greedy responses are no sample to estimate from, and KL per token needs one vocabulary.
        if temperature == 0 or policy.tokenizer.get_vocab() != reference.policy.tokenizer.get_vocab():
            return {}
        if system is reference:
            # The reference's drift from itself is 0 without a forward pass.
            zero = [[0.0] * len(samples) for samples in response_set.responses]
            return {"kl": zero, "kl_k3": zero}
        prompts, ref_prompts = plan.prompts[system.name], plan.prompts[plan.reference]
        policy_logprobs = self.models.logprobs_of(policy.name, temperature)
        ref_logprobs = self.models.logprobs_of(reference.policy.name, temperature)
        key = digest(
            {
                # Everything that the numbers depend on. The count behind "kl" is raised when the computation changes.
                "what": "kl 4",
                "policy": policy.key,
                "reference": reference.policy.key,
                "prompts": [prompts, ref_prompts],
                "responses": _tokens(response_set),
                "temperature": temperature,
                "precision": plan.precision,
            }
        )
        measured: dict[str, Any] = self.results.read_or_compute(
            f"kl-{system.name}",
            key,
            lambda: kl_values(policy_logprobs, ref_logprobs, prompts, response_set, ref_prompts),
        )
        self._check_sampler(system, response_set.engine, measured.pop("sampler_gap"))
        return measured

    def _check_sampler(self, system: System, engine: str, gap: float) -> None:
        """Check that the engine sampled from the checkpoint; ``gap`` is their mean difference in nats per token."""
        is_exact = self.plan.precision == "float32" and self.context.runtime.engine.dtype != "bfloat16"
        tolerance = SAMPLER_TOLERANCE["float32" if is_exact else "bfloat16"]
        logger.info("%s: sampler and policy differ by %.4f nats per token (limit %s)", system.name, gap, tolerance)
        if not gap <= tolerance:  # also true for NaN
            raise RuntimeError(
                f"the {engine} engine and the checkpoint '{system.policy.name}' differ by {gap:.3f} nats per token; at "
                f"most {tolerance} was expected: the responses are not this checkpoint's. Set runtime.engine.name to "
                "transformers, and report this."
            )

    def measure_heldout(self) -> dict[str, tuple[list[float], list[int]]]:
        """Return, by checkpoint, the loss per token and the tokens of the held-out rows that fit every checkpoint."""
        plan = self.plan
        if not plan.heldout:
            return {}
        losses: dict[str, tuple[list[int], list[float], list[int]]] = {}
        # Two datasets may share ids, so the key holds the rows themselves, as far as they are read.
        rows = digest(
            [
                [row["prompt"], row["completion"], is_finished(row, "completion"), row.get("tools")]
                for row in plan.heldout
            ]
        )
        for policy in plan.policies:
            key = digest(["held-out loss 2", policy.key, rows, plan.heldout_length, plan.precision])
            logprobs_of = self.models.logprobs_of(policy.name, 1.0)
            measure = partial(heldout_losses, logprobs_of, policy.tokenizer, plan.heldout, plan.heldout_length)
            indices, values, tokens = self.results.read_or_compute(f"heldout-{policy.name}", key, measure)
            losses[policy.name] = indices, values, tokens
            self.context.progress(len(losses), len(plan.policies), unit="held-out sets read")
        # Templates and tokenizers differ, so a row may fit one checkpoint and not another.
        # Only rows that every checkpoint could read are compared, so that the losses are paired.
        common = set.intersection(*(set(indices) for indices, _, _ in losses.values()))
        left_out = len(plan.heldout) - len(common)
        if left_out:
            self.context.warn(
                f"{left_out} of {len(plan.heldout)} held-out rows left out: longer than max_heldout_length"
            )
        heldout = {}
        for name, (indices, values, tokens) in losses.items():
            positions = [position for position, index in enumerate(indices) if index in common]
            heldout[name] = ([values[position] for position in positions], [tokens[position] for position in positions])
        return heldout


def _tokens(response_set: ResponseSet) -> list[Any]:
    """Return the parts of responses that KL depends on; log-probabilities as text, since one may be NaN."""
    return [
        [[response.token_ids, repr(response.logprobs)] for response in samples] for samples in response_set.responses
    ]
