"""Drift of a system from the reference: KL on its own answers, and loss on held-out answers.

Both come from the checkpoints' own forward passes, cached under a key of their inputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from align.data.rows import is_finished
from align.evaluation.answers import ResponseSet, Values
from align.evaluation.logprobs import LoadedModels, LogprobsOf, heldout_losses
from align.evaluation.plan import Plan
from align.evaluation.scoring import ResultCache
from align.evaluation.systems import Policy, System
from align.inference.protocol import Response
from align.pipeline.context import StageContext
from align.store.fingerprint import digest

logger = logging.getLogger(__name__)
HeldoutLosses = tuple[list[int], list[float], list[int]]
"""Indices of the rows that were read, their loss per token in nats, and their tokens."""
SAMPLER_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""Largest mean |sampler - policy| log-probability per token, in nats: above it the engine holds other weights."""
Prompts = Sequence[list[int]]
"""Token ids of prompts."""
TOKEN_PROMPTS = 200
"""Prompts whose first response has its KL token by token in the samples."""


class DriftMeasurement:
    """Measures the drift of the compared systems, checkpoint by checkpoint, so each is loaded once.

    The reference comes first (``reading_order``): it reads all systems' responses in one pass. Every other checkpoint
    then reads its systems' responses.
    """

    def __init__(
        self,
        context: StageContext,
        plan: Plan,
        models: LoadedModels,
        results: ResultCache,
        response_sets: dict[str, ResponseSet],
    ) -> None:
        self.context = context
        self.plan = plan
        self.models = models
        self.results = results
        self.response_sets = response_sets
        self.reference = next(system for system in plan.systems if system.name == plan.reference)
        self._measured: dict[str, dict[str, Any]] = {}
        """KL by system, as far as it is known."""
        self._ref_logprobs: dict[str, list[list[float]]] = {}
        self._losses: dict[str, HeldoutLosses] = {}
        """Held-out losses by checkpoint."""
        self._losses_of_key: dict[str, HeldoutLosses] = {}
        """The same by the key of the weights, which several checkpoints may share."""
        self._missing = self._find_missing()

    def reading_order(self) -> list[Policy]:
        """Return the checkpoints: first all with the reference's weights, then the others grouped by equal weights."""
        keys = list(dict.fromkeys([self.reference.policy.key, *(policy.key for policy in self.plan.policies)]))
        return sorted(self.plan.policies, key=lambda policy: keys.index(policy.key))

    def measure(self, policy: Policy) -> None:
        """Pass the responses of a checkpoint's systems and the held-out rows through it, in ``reading_order``.

        Raises ``RuntimeError`` if its log-probabilities differ too much from the engine's.
        """
        self._measure_kl(policy)
        if self.plan.heldout:
            self._measure_heldout(policy)

    # ---- KL ----

    def kl(self, values: dict[str, dict[str, Values]]) -> dict[str, list[list[float]]]:
        """Add the KL to the reference to every system's ``values``, but for best of N; return it token by token."""
        by_system: dict[str, list[list[float]]] = {}
        for system in self.plan.systems:
            if system.name not in self._measured:  # no prompt set, or KL has no meaning there
                continue
            measured = dict(self._measured[system.name])
            token_kl = measured.pop("token_kl", None)
            values[system.name] |= measured
            if token_kl:
                by_system[system.name] = token_kl
        return by_system

    def _find_missing(self) -> list[System]:
        """Return the systems whose KL has to be measured, and read the KL of the others from the cache.

        A system has no KL if it has no meaning: greedy responses are not a sample to estimate from, and KL per
        token needs one vocabulary.
        """
        missing: list[System] = []
        if self.plan.sampling.temperature == 0:
            return missing
        vocabulary = self.reference.policy.tokenizer.get_vocab()
        for system in self.plan.systems:
            if system.name not in self.response_sets or system.info.role == "best_of":
                continue
            if system.policy.tokenizer.get_vocab() != vocabulary:
                continue
            if system is self.reference:
                # The reference's drift from itself is 0 without a forward pass.
                zero = [[0.0] * len(samples) for samples in self.response_sets[system.name].responses]
                self._measured[system.name] = {"kl": zero, "kl_k3": zero}
                continue
            measured = self.results.read(*self._entry(system))
            if measured is None:
                missing.append(system)
            else:
                self._keep(system, measured)
        return missing

    def _entry(self, system: System) -> tuple[str, str]:
        """Return the name and the key of a system's KL in the cache."""
        plan = self.plan
        key = digest(
            {
                # Everything that the numbers depend on. The count behind "kl" is raised when the computation changes.
                "what": "kl 5",
                "policy": system.policy.key,
                "reference": self.reference.policy.key,
                "prompts": [plan.prompts[system.name], plan.prompts[plan.reference]],
                "responses": _tokens(self.response_sets[system.name]),
                "temperature": plan.sampling.temperature,
                "precision": plan.precision,
            }
        )
        return f"kl-{system.name}", key

    def _keep(self, system: System, measured: dict[str, Any]) -> None:
        self._check_sampler(system, self.response_sets[system.name].engine, measured.pop("sampler_gap"))
        self._measured[system.name] = measured

    def _measure_kl(self, policy: Policy) -> None:
        """Measure the KL of the systems of a checkpoint, and of all other checkpoints with the same weights."""
        plan = self.plan
        systems = [system for system in self._missing if system.policy.key == policy.key]
        reads = [(plan.prompts[system.name], self.response_sets[system.name]) for system in systems]
        ref_reads = []
        if policy.key == self.reference.policy.key and not self._ref_logprobs:
            # Systems that also have the reference's weights and prompts are read once for both.
            ref_reads = [(plan.prompts[plan.reference], self.response_sets[system.name]) for system in self._missing]
        if not reads and not ref_reads:
            return
        # One call reads both, so equal rows and common beginnings are read once.
        logprobs_of = self.models.logprobs_of(policy.name, plan.sampling.temperature, self._report)
        logprobs = read_responses(logprobs_of, [*reads, *ref_reads])
        # The reference reads first, so its numbers are known when other checkpoints compute their KL.
        if ref_reads:
            names = [system.name for system in self._missing]
            self._ref_logprobs = dict(zip(names, logprobs[len(reads) :], strict=True))
        for system, policy_logprobs in zip(systems, logprobs[: len(reads)], strict=True):
            measured = kl_values(policy_logprobs, self._ref_logprobs[system.name], self.response_sets[system.name])
            self._keep(system, self.results.write(*self._entry(system), measured))
        self._missing = [system for system in self._missing if system not in systems]

    def _report(self, completed: int, total: int) -> None:
        self.context.progress(completed, total, unit="answers read")

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

    # ---- held-out loss ----

    def _measure_heldout(self, policy: Policy) -> None:
        plan = self.plan
        # Two datasets may share ids, so the key holds the rows themselves, as far as they are read.
        rows = digest(
            [
                [row["prompt"], row["completion"], is_finished(row, "completion"), row.get("tools")]
                for row in plan.heldout
            ]
        )
        key = digest(["held-out loss 4", policy.key, rows, plan.heldout_length, plan.precision])
        logprobs_of = self.models.logprobs_of(policy.name, 1.0, self._report)

        def measure() -> HeldoutLosses:
            if policy.key in self._losses_of_key:
                return self._losses_of_key[policy.key]
            return heldout_losses(logprobs_of, policy.tokenizer, plan.heldout, plan.heldout_length)

        indices, values, tokens = self.results.read_or_compute(f"heldout-{policy.name}", key, measure)
        self._losses[policy.name] = self._losses_of_key[policy.key] = indices, values, tokens

    def heldout(self) -> dict[str, tuple[list[float], list[int]]]:
        """Return, by checkpoint, the loss per token and the tokens of the held-out rows that fit every checkpoint."""
        plan = self.plan
        if not plan.heldout:
            return {}
        # Templates and tokenizers differ, so a row may fit one checkpoint and not another.
        # Only rows that every checkpoint could read are compared, so the losses are paired.
        common = set.intersection(*(set(indices) for indices, _, _ in self._losses.values()))
        left_out = len(plan.heldout) - len(common)
        if left_out:
            self.context.warn(
                f"{left_out} of {len(plan.heldout)} held-out rows left out: longer than max_heldout_length, or without "
                "a turn to train on"
            )
        heldout = {}
        for policy in plan.policies:
            indices, values, tokens = self._losses[policy.name]
            positions = [position for position, index in enumerate(indices) if index in common]
            losses = [values[position] for position in positions]
            heldout[policy.name] = (losses, [tokens[position] for position in positions])
        return heldout


def _tokens(response_set: ResponseSet) -> list[Any]:
    """Return the parts of responses that KL depends on; log-probabilities as text, since one may be NaN."""
    return [
        [[response.token_ids, repr(response.logprobs)] for response in samples] for samples in response_set.responses
    ]


def read_responses(logprobs_of: LogprobsOf, reads: Sequence[tuple[Prompts, ResponseSet]]) -> list[list[list[float]]]:
    """Return the log-probabilities of each set's response tokens after its prompts, by one call for all sets.

    The sets' responses are in one list each, prompt by prompt, as ``kl_values`` expects them.
    """
    prompts: list[list[int]] = []
    tokens: list[list[int]] = []
    sizes = []
    for set_prompts, response_set in reads:
        responses, repeated = response_set.flatten(set_prompts)
        prompts += repeated
        tokens += [response.token_ids for response in responses]
        sizes.append(len(responses))
    remaining = iter(logprobs_of(prompts, tokens))
    return [[next(remaining) for _ in range(size)] for size in sizes]


def kl_values(
    logprobs: Sequence[Sequence[float]], ref_logprobs: Sequence[Sequence[float]], response_set: ResponseSet
) -> dict[str, Any]:
    """Return ``kl`` and ``kl_k3``: estimates of each response's KL to the reference in nats, see :func:`sequence_kl`.

    Args:
        logprobs: The policy's log-probabilities of all responses, prompt by prompt.
        ref_logprobs: The reference's.
        response_set: The responses.

    Returns:
        Also ``token_kl``, the k1 estimate of each token of the first response to the first ``TOKEN_PROMPTS`` prompts,
        and ``sampler_gap``, the mean |sampler - policy| log-probability per token. The gap is large if the engine
        sampled from other weights than the policy's.
    """
    responses = [response for samples in response_set.responses for response in samples]
    logprobs = _zero_forced(logprobs, responses)
    ref_logprobs = _zero_forced(ref_logprobs, responses)
    estimates = [sequence_kl(values, ref_values) for values, ref_values in zip(logprobs, ref_logprobs, strict=True)]
    gap = 0.0
    for response, values in zip(responses, logprobs, strict=True):
        # The engine's log-probabilities against the trainer's: a large gap means that other weights were sampled.
        gap += sum(abs(sampled - value) for sampled, value in zip(response.logprobs, values, strict=True))
    sampled_tokens = sum(sum(response.mask) for response in responses)
    return {
        "kl": response_set.unflatten([k1 for k1, _ in estimates]),
        "kl_k3": response_set.unflatten([k3 for _, k3 in estimates]),
        "token_kl": _token_kl(logprobs, ref_logprobs, response_set),
        "sampler_gap": gap / max(1, sampled_tokens),
    }


def _zero_forced(logprobs: Sequence[Sequence[float]], responses: Sequence[Response]) -> list[list[float]]:
    """Return log-probabilities with 0 for tokens that a thinking budget forced, as the engine has it."""
    return [
        [value if is_sampled else 0.0 for value, is_sampled in zip(values, response.mask, strict=True)]
        for values, response in zip(logprobs, responses, strict=True)
    ]


def _token_kl(
    logprobs: Sequence[Sequence[float]], ref_logprobs: Sequence[Sequence[float]], response_set: ResponseSet
) -> list[list[float]]:
    token_kl = []
    start = 0
    for samples in response_set.responses[:TOKEN_PROMPTS]:
        # ``start`` is the first response of the prompt in the flat lists.
        pairs = zip(logprobs[start], ref_logprobs[start], strict=True)
        token_kl.append([round(logprob - ref_logprob, 4) for logprob, ref_logprob in pairs])
        start += len(samples)
    return token_kl


def sequence_kl(logprobs: Sequence[float], ref_logprobs: Sequence[float]) -> tuple[float, float]:
    """Estimate KL(policy || reference) from one response of the policy, in nats: k1 and k3, of (T,) log-probabilities.

    k1 = sum(log p - log q) is unbiased; k3 = sum(q/p - 1 - log(q/p)) is never negative and varies less
    (Schulman 2020, "Approximating KL divergence").
    """
    # The log of q/p for each token.
    ratios = [ref_logprob - logprob for logprob, ref_logprob in zip(logprobs, ref_logprobs, strict=True)]
    return -math.fsum(ratios), math.fsum(math.expm1(ratio) - ratio for ratio in ratios)
