"""Score checkpoints on held-out prompts: gold, reward model, drift, held-out loss; every number with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from align.artifacts import GENERATORS, PROMPT_SOURCES, Kind
from align.errors import UserError
from align.stage import Config, StageContext, stage_input


class EvaluateConfig(Config):
    """Which checkpoints answer which prompts, and what scores the answers."""

    policies: list[stage_input(*GENERATORS)] = Field(min_length=1)  # type: ignore[valid-type]
    """Stages whose checkpoints are compared, in the order the report shows them."""
    reference: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """One of ``policies``: differences and KL are taken against it, usually the SFT stage."""
    prompts: stage_input(*PROMPT_SOURCES)  # type: ignore[valid-type]
    """Stage whose ``test`` split has the prompts."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Reward model that scores the responses; shown beside the gold score as the proxy it is."""
    pairs: stage_input(Kind.PREFERENCES) | None = None  # type: ignore[valid-type]
    """Preferences whose ``test`` split measures the reward model's accuracy."""
    heldout: stage_input(Kind.INSTRUCTIONS) | None = None  # type: ignore[valid-type]
    """Instructions whose ``test`` split gives every checkpoint's loss per token on reference answers."""
    score: str | None = None
    """A program that scores responses: ``gold`` or ``package.module:function``."""
    max_prompts: int | None = Field(None, ge=1)
    """At most so many prompts, drawn by seed; intervals narrow with the square root of it. All when absent."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt and checkpoint, averaged before the statistics: less variance, more time."""
    max_tokens: int = Field(64, ge=1)
    """Longest response, in tokens; a longer one is cut and counts as not finished."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompts longer than this under any checkpoint's template are left out, and counted."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; KL is measured at the same one. 0 is greedy and leaves KL out."""
    max_pairs: int | None = Field(None, ge=1)
    """At most so many held-out pairs, drawn by seed."""
    max_heldout: int | None = Field(256, ge=1)
    """At most so many held-out answers, drawn by seed."""
    max_heldout_length: int = Field(1024, ge=2)
    """Held-out rows longer than this, in tokens, are left out, and counted."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products, in sampling and scoring."""
    bootstrap: int = Field(10_000, ge=100)
    """Resamples behind every interval and permutation test; the smallest p-value is about 1 / this."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if self.reference not in self.policies:
            raise ValueError(
                f"reference '{self.reference}' is not among policies ({', '.join(self.policies)}); add it to them, "
                "or name one of them."
            )
        if len(set(self.policies)) < len(self.policies):
            raise ValueError("policies names a stage twice; name each once.")
        if self.pairs is not None and self.reward is None:
            raise ValueError("pairs measures a reward model, but reward is missing; name a reward stage.")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """What the scoring program is: its version or the digest of its file."""
        if self.score is None:
            return {}
        from align.data.scoring import function_identity

        return {"score": function_identity(self.score)}


def run(context: StageContext) -> dict[str, Any]:
    """Evaluate, write ``scorecard.json`` and ``samples.jsonl``, and return the headline numbers.

    Raises ``UserError`` for an empty test split and prompts that are all too long.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from align.evaluation.evaluator import evaluate
    from align.rollouts.engine import open_engine

    config: EvaluateConfig = context.config
    plan = _plan(context)
    longest = max(len(ids) for per in plan.prompts.values() for ids in per) + config.max_tokens

    def opened(model_dir: Path, runtime: Any) -> Any:
        return open_engine(
            model_dir,
            runtime,
            precision=config.precision,
            max_length=longest,
            seed=context.seed,
            warn=context.warn,
            on_hang=context.fail_at_once,
        )

    card, generated = evaluate(context, plan, opened)
    sampled = sum(len(one.token_ids) for each in generated.values() for samples in each.responses for one in samples)
    return _metrics(card) | {"tokens": sampled}


def _plan(context: StageContext) -> Any:
    """Read rows and tokenizers, choose prompts by seed, and put together what is evaluated."""
    from align.data.rows import read_rows
    from align.data.scoring import function_identity, function_scorer
    from align.evaluation.evaluator import Plan
    from align.evaluation.prompts import Policy, choose_rows, render_for_all
    from align.evaluation.scorecard import Resampling
    from align.models.loading import load_tokenizer
    from align.rollouts.protocol import Sampling

    config: EvaluateConfig = context.config
    artifacts = context.inputs["policies"]
    policies = [Policy(one.stage, one.model, one.record["key"], load_tokenizer(one.model)) for one in artifacts]

    def rows_of(field: str, most: int | None) -> list[dict[str, Any]]:
        if context.inputs.get(field) is None:
            return []
        path = context.artifact(field).split("test")
        rows = read_rows(path)
        if not rows:
            raise UserError(f"{field}: {path} has no rows; give its stage a test split.")
        return choose_rows(rows, most, context.seed)

    rows, prompts, too_long = render_for_all(rows_of("prompts", config.max_prompts), policies, config.max_prompt_tokens)
    if not rows:
        raise UserError(f"prompts: all {too_long} are longer than max_prompt_tokens={config.max_prompt_tokens}.")
    if too_long:
        context.warn(f"{too_long} prompts left out: longer than max_prompt_tokens={config.max_prompt_tokens}")
    return Plan(
        policies=policies,
        reference=context.artifact("reference").stage,
        base=next((one.stage for one in artifacts if one.kind == Kind.MODEL), None),
        rows=rows,
        prompts=dict(prompts),
        sampling=Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            n=config.samples_per_prompt,
            seed=context.seed,
        ),
        scorer=None if config.score is None else function_scorer(config.score),
        scorer_identity="" if config.score is None else function_identity(config.score),
        reward=context.inputs.get("reward"),
        pairs=rows_of("pairs", config.max_pairs),
        heldout=rows_of("heldout", config.max_heldout),
        heldout_length=config.max_heldout_length,
        precision=config.precision,
        resampling=Resampling(config.bootstrap, context.seed),
    )


def _metrics(card: dict[str, Any]) -> dict[str, Any]:
    """The record's summary of a scorecard: every estimate's value, and the decisive differences."""
    accuracy = card["reward_model"]
    return {
        "prompts": card["settings"]["prompts"],
        "engines": card["settings"]["engines"],
        "values": {
            policy: {name: estimate["value"] for name, estimate in per.items()}
            for policy, per in card["estimates"].items()
        },
        "differences": [
            {key: row[key] for key in ("policy", "against", "metric", "value", "low", "high", "p_holm", "verdict")}
            for row in card["differences"]
            if row["metric"] == card["primary"]
        ],
        "reward_accuracy": accuracy and accuracy["as_labelled"]["value"],
        "reward_accuracy_true": accuracy and accuracy["true"] and accuracy["true"]["value"],
        "flags": [flag["text"] for flag in card["flags"]],
    }
