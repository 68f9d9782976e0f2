"""Runs the stage ``evaluate``: scores checkpoints on prompts, on benchmarks and by judges, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.config.scores import metric_functions, verifier_kinds
from align.config.stages.evaluate import EvaluateConfig
from align.pipeline.context import StageContext
from align.verifiers.verdict import explain_low_scores


def run(context: StageContext) -> dict[str, Any]:
    """Evaluate, write the scorecard, samples and items, and return the headline numbers.

    Raises ``UserError`` for an empty test split, prompts that are all too long, tasks whose data does not fit, and
    gates on metrics that are not measured.
    """
    from align.models.compute.processes import keep_freed_memory, use_threads

    use_threads(context.runtime)
    keep_freed_memory()
    from align.evaluation.evaluator import evaluate
    from align.evaluation.plan import make_plan
    from align.inference.engine import open_engine
    from align.scoring.score import Part, WeightedSum

    # Everything is read and checked before the engine starts.
    plan = make_plan(context)

    def open_for(model_dir: Path, runtime: Any) -> Any:
        context.phase("starting the engine")
        return open_engine(
            model_dir,
            runtime,
            precision=context.precision,
            max_length=plan.max_length,
            seed=context.seed,
            warn=context.warn,
            on_hang=context.fail_at_once,
        )

    card, responses = evaluate(context, plan, open_for)
    if context.runtime.report_to:
        # Import it only here, because it imports transformers' Trainer, which is slow and is not needed otherwise.
        from align.training.tracking import scorecard_values, track_result

        track_result(context, scorecard_values(card), card["settings"])
    parts = () if plan.scorer is None else plan.scorer.parts
    programs = (Part(program.metric, 1.0, program.scorer) for program in plan.programs)
    usage = WeightedSum((*parts, *programs)).facts()
    numbers = headline(card)
    reasons = score_reasons(context.config, numbers)
    return numbers | ({"score_reasons": reasons} if reasons else {}) | {"tokens": responses.tokens} | usage


def score_reasons(config: EvaluateConfig, numbers: dict[str, Any]) -> list[str]:
    """Return why verifiers score nearly all responses of a system 0, from the headline numbers."""
    kinds = {f"score_{name}": kind for name, kind in verifier_kinds(config).items()}
    kinds |= {entry.metric: entry.verifier for entry in metric_functions(config.metrics) if entry.verifier is not None}
    total = numbers["prompts"] * config.samples_per_prompt
    return [
        f"{policy}: {line}"
        for policy, values in numbers["values"].items()
        for line in explain_low_scores(kinds, values, total, values)
    ]


def headline(card: dict[str, Any]) -> dict[str, Any]:
    """Summarize a scorecard for the record: every estimate's value, the primary metric's differences, failed gates."""
    from align.evaluation.scorecard.gates import failed_gates

    models = card["reward_models"]
    accuracy = models[0] if models else None
    return {
        "prompts": card["settings"]["prompts"],
        "items": {name: task["n"] for name, task in card["tasks"].items()},
        "engines": card["settings"]["engines"],
        "values": {
            policy: {name: estimate["value"] for name, estimate in estimates.items()}
            for policy, estimates in card["estimates"].items()
        },
        "differences": [
            {key: row[key] for key in ("policy", "against", "metric", "value", "low", "high", "p_holm", "verdict")}
            for row in card["differences"]
            if row["metric"] == card["primary"]
        ],
        "reward_accuracy": accuracy and accuracy["as_labeled"]["value"],
        "reward_accuracy_true": accuracy and accuracy.get("true") and accuracy["true"]["value"],
        "flags": [flag["text"] for flag in card["flags"]],
        "failed_gates": failed_gates(card["gates"]),
    }
