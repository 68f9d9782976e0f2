"""Score checkpoints: on held-out prompts, on benchmarks, by judges; every number with its interval."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from align.config.base import Config, stage_input
from align.errors import UserError
from align.evaluation.gates import DRIFT, GateSpec, parse_gates
from align.evaluation.prompt_metrics import METRICS
from align.evaluation.systems import BaselineConfig
from align.evaluation.tasks.base import TaskConfig
from align.evaluation.tasks.registry import AnyTask, named_tasks
from align.pipeline.context import StageContext
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
PROMPT_SET = "prompts"


class EvaluateConfig(Config):
    """Which systems answer what, and what scores the answers."""

    policies: list[stage_input(*GENERATORS)] = Field(min_length=1)  # type: ignore[valid-type]
    """Stages whose checkpoints are compared, in the order the report shows them."""
    reference: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """One of ``policies``: differences and KL are taken against it, usually the SFT stage."""
    prompts: stage_input(*PROMPT_SOURCES) | None = None  # type: ignore[valid-type]
    """Stage whose ``test`` split has the prompts; left out where ``tasks`` alone are asked."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Reward model that scores the responses; shown beside the gold score as the proxy it is."""
    second_reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Another one, to see how far the two agree."""
    pairs: stage_input(Kind.PREFERENCES) | None = None  # type: ignore[valid-type]
    """Preferences whose ``test`` split measures the reward models' accuracy; the task ``preference`` reads them too."""
    heldout: stage_input(Kind.INSTRUCTIONS) | None = None  # type: ignore[valid-type]
    """Instructions whose ``test`` split gives every checkpoint's loss per token on reference answers."""
    texts: list[stage_input(Kind.TEXTS)] = Field([])  # type: ignore[valid-type]
    """Plain texts whose ``test`` split the task ``perplexity`` reads: ``domain: {task: perplexity, texts: books}``."""
    score: str | None = None
    """A program that scores responses: ``gold`` or ``package.module:function``."""
    tasks: dict[str, AnyTask] = Field({})
    """Benchmarks and checks by name: ``ifeval: {files: [...]}``; a name of your own needs ``task:`` with the kind."""
    baselines: dict[str, BaselineConfig] = Field({})
    """Ways to use a checkpoint without training it, by name: prompted, or the best of N answers."""
    gates: dict[str, GateSpec] = Field({})
    """Bounds that must hold, by metric: ``ifeval.prompt_strict: ">= sft - 0.02"``. A run that breaks one ends with exit
    code 1, after everything else is done and written."""
    max_prompts: int | None = Field(None, ge=1)
    """At most so many prompts, drawn by seed; intervals narrow with the square root of it. All when absent."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt and checkpoint, averaged before the statistics: less variance, more time."""
    max_tokens: int = Field(64, ge=1)
    """Longest response to a prompt, in tokens; a longer one is cut and counts as not finished. Tasks have their own."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompts longer than this under any checkpoint's template are left out, and counted."""
    max_context: int = Field(2048, ge=16)
    """Tokens of a task's conversation and its answer together that the engine makes room for, where the model has as
    many positions; a longer one counts as not answered, and is counted."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of ``prompts``; KL is measured at the same one. 0 is greedy and leaves KL out."""
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

    identified: ClassVar[frozenset[str]] = frozenset({"tasks", "baselines"})

    @field_validator("tasks", mode="before")
    @classmethod
    def _kinds(cls, given: Any) -> Any:
        return named_tasks(given)

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if self.reference not in self.policies:
            raise ValueError(
                f"reference '{self.reference}' is not among policies ({', '.join(self.policies)}); add it to them, "
                "or name one of them."
            )
        if len(set(self.policies)) < len(self.policies):
            raise ValueError("policies names a stage twice; name each once.")
        if self.prompts is None and not self.tasks and self.pairs is None and self.heldout is None:
            raise ValueError("nothing to evaluate on; name a stage of prompts, or tasks.")
        if self.pairs is not None and self.reward is None and not self._has("preference"):
            raise ValueError("pairs measures a reward model, but reward is missing; name a reward stage.")
        if self.second_reward is not None and self.reward is None:
            raise ValueError("second_reward is compared with reward, which is missing; name it as reward.")
        for name, task in self.tasks.items():
            of = getattr(task, "texts", None)
            if of is not None and of not in self.texts:
                known = ", ".join(self.texts) or "none"
                raise ValueError(f"tasks.{name}: texts '{of}' is none of the stage's texts ({known}); add it there.")
        if self.score is not None and self.prompts is None:
            raise ValueError("score is the program for the responses to prompts, and there are none; name prompts.")
        return self

    @model_validator(mode="after")
    def _names(self) -> EvaluateConfig:
        for what, names in (("tasks", self.tasks), ("baselines", self.baselines)):
            for name in names:
                if not NAME.fullmatch(name) or name == PROMPT_SET:
                    raise ValueError(f"{what}: '{name}' is no name for one; use letters, digits, - and _, another word "
                                     f"than {PROMPT_SET}.")  # fmt: skip
        for name, baseline in self.baselines.items():
            if name in self.policies:
                raise ValueError(f"baselines: '{name}' is a stage already; choose another name.")
            if baseline.of not in self.policies:
                raise ValueError(
                    f"baselines.{name}: of '{baseline.of}' is none of policies ({', '.join(self.policies)})"
                )
            if baseline.best_of > 1 and self.reward is None:
                raise ValueError(f"baselines.{name}: best_of keeps what the reward model likes best; name reward.")
        parse_gates(self.gates, [*self.policies, *self.baselines], self.reference, list(self.tasks), list(METRICS))
        return self

    def _has(self, kind: str) -> bool:
        return any(task.kind == kind for task in self.tasks.values())

    @classmethod
    def rename_stages(cls, block: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
        """The block as the YAML has it, with stages renamed also where baselines and gates name them."""
        changed = dict(block)
        baselines, gates = block.get("baselines"), block.get("gates")
        if isinstance(baselines, dict):
            changed["baselines"] = {
                name: {**one, "of": rename(one["of"])}
                if isinstance(one, dict) and isinstance(one.get("of"), str)
                else one
                for name, one in baselines.items()
            }
        if isinstance(gates, dict):
            changed["gates"] = {_rename_key(str(key), rename): _rename_words(one, rename) for key, one in gates.items()}
        return changed

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of everything read outside the store, and the settings of tasks and baselines, one by one."""
        found: dict[str, str] = {}
        if self.score is not None:
            from align.config.user_functions import function_identity

            found["score"] = function_identity(self.score)
        for what, blocks in (("tasks", self.tasks), ("baselines", self.baselines)):
            for name, block in blocks.items():
                place = f"{what}.{name}"
                settings = block.model_dump(mode="json", exclude=set(block.identified))
                found[place] = json.dumps(settings, sort_keys=True)
                try:
                    found |= {f"{place}.{key}": value for key, value in block.identities(base).items()}
                except UserError as error:
                    raise UserError(f"{place}.{error}") from None
        return found


def _rename_key(key: str, rename: Callable[[str], str]) -> str:
    """``dpo/gold`` and ``kl_to_dpo`` with the stage's real name."""
    system, slash, metric = key.rpartition("/")
    if metric.startswith(DRIFT):
        metric = DRIFT + rename(metric.removeprefix(DRIFT))
    return f"{rename(system)}/{metric}" if slash else metric


def _rename_words(spec: Any, rename: Callable[[str], str]) -> Any:
    """Every name in a bound, or in a gate's ``systems``."""
    if isinstance(spec, str):
        return NAME.sub(lambda found: rename(found.group()), spec)
    if isinstance(spec, list):
        return [_rename_words(one, rename) for one in spec]
    if isinstance(spec, dict):
        return {key: _rename_words(one, rename) if key in ("bound", "systems") else one for key, one in spec.items()}
    return spec


def run(context: StageContext) -> dict[str, Any]:
    """Evaluate, write the scorecard, samples and items, and return the headline numbers.

    Raises ``UserError`` for an empty test split and prompts that are all too long, for tasks whose data does not fit,
    and for gates on numbers that no task makes.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from align.evaluation.evaluator import evaluate
    from align.evaluation.planning import make_plan
    from align.inference.engine import open_engine
    from align.training.tracking import scorecard_values, track_result

    config: EvaluateConfig = context.config
    plan = make_plan(context)

    def opened(model_dir: Path, runtime: Any) -> Any:
        return open_engine(
            model_dir,
            runtime,
            precision=config.precision,
            max_length=plan.longest,
            seed=context.seed,
            warn=context.warn,
            on_hang=context.fail_at_once,
        )

    card, answered = evaluate(context, plan, opened)
    track_result(context, scorecard_values(card), card["settings"])
    return headline(card) | {"tokens": answered.tokens}


def headline(card: dict[str, Any]) -> dict[str, Any]:
    """The record's summary of a scorecard: every estimate's value, the decisive differences, broken gates."""
    from align.evaluation.gates import failed_gates

    models = card["reward_models"]
    accuracy = models[0] if models else None
    return {
        "prompts": card["settings"]["prompts"],
        "items": {name: task["n"] for name, task in card["tasks"].items()},
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
        "reward_accuracy": accuracy and accuracy["as_labeled"]["value"],
        "reward_accuracy_true": accuracy and accuracy.get("true") and accuracy["true"]["value"],
        "flags": [flag["text"] for flag in card["flags"]],
        "failed_gates": failed_gates(card["gates"]),
    }


__all__ = ["EvaluateConfig", "TaskConfig", "headline", "run"]
