"""Settings of the stage ``synthesize``: instructions, responses or pairs from a model. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, StrictBool, model_validator

from align.config.base import Config, stage_input
from align.config.stages.sample import SplitCounts
from align.config.stages.synthesis_tasks import PairsTask, Task
from align.errors import UserError
from align.evaluation.judges.judge import JudgeConfig
from align.inference.endpoint import EndpointConfig
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind
from align.store.fingerprint import canonical, file_digest


class SynthesizeConfig(Config):
    """What is made, who makes it, and who says what is good."""

    task: Task
    """``{type: instructions|responses|best_of|pairs, ...}``."""
    model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """The stage whose checkpoint answers, through ``runtime.engine``; null for ``endpoint``."""
    endpoint: EndpointConfig | None = None
    """An OpenAI-compatible server that answers, in place of ``model``."""
    prompts: stage_input(*PROMPT_SOURCES) | None = None  # type: ignore[valid-type]
    """The stage whose prompts are answered, both splits; for instructions, whose train prompts are the seeds."""
    seeds: str | None = None
    """Seed instructions: a .jsonl file whose records have ``instruction``, as self-instruct's seed_tasks.jsonl has."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """A reward stage that scores answers."""
    score: str | None = None
    """A function that scores answers: ``gold``, ``gsm8k_answer``, or an import path ``module:name``."""
    judge: JudgeConfig | None = None
    """A model that compares answers two by two, in both orders; for pairs only."""
    judge_model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """The stage whose checkpoint judges, where ``judge`` has no endpoint."""
    system: str | None = Field(None, min_length=1)
    """System message put before every prompt that has none when it is asked; the rows made do not hold it."""
    temperature: float = Field(1.0, ge=0, le=5)
    """Logits are divided by it; higher gives more varied answers. 0 is greedy, for ``n: 1``."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens that make up this much probability; 1 keeps all."""
    max_tokens: int = Field(512, ge=1)
    """Tokens an answer may have."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer prompts are dropped, and counted; of ``model`` and ``judge_model`` only, a server has its own limit."""
    max_prompts: SplitCounts = SplitCounts()
    """``{train: 600, test: 100}``: prompts used of each split at most."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products of ``model``, ``judge_model`` and ``reward``."""
    cache: StrictBool | str = True
    """Where stages and runs share their answers, so that none is asked for twice: true for the store's own cache, a
    folder for another one, false for none. A stage that was killed goes on from answers of its own in any case."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before the endpoints cost more in all, by their prices; raise it and run again to go on."""
    on_error: Literal["stop", "drop"] = "stop"
    """What a request comes to that an endpoint refuses as such or never answers readably: the end, or a dropped row.
    Part of the key: rows that were dropped are no result of a stage that should have stopped."""

    # The endpoints' addresses and models, the seeds' content and the scorer's code enter by ``identities``; how often,
    # how fast and for how much an endpoint is asked changes nothing of what is made.
    identified: ClassVar[frozenset[str]] = frozenset({"endpoint", "seeds", "score", "judge", "cache", "max_cost"})

    @model_validator(mode="after")
    def _one_generator(self) -> SynthesizeConfig:
        if (self.model is None) == (self.endpoint is None):
            have = "both are" if self.model else "neither is"
            raise ValueError(f"model or endpoint answers, one of them; {have} set")
        if self.judge is not None and (self.judge_model is None) == (self.judge.endpoint is None):
            have = "both are" if self.judge_model else "neither is"
            raise ValueError(f"judge.endpoint or judge_model judges, one of them; {have} set")
        if self.judge is None and self.judge_model is not None:
            raise ValueError("judge_model needs `judge: {}` beside it, which says how it is asked")
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> SynthesizeConfig:
        kind = self.task.type
        if kind == "instructions" and (self.seeds is None) == (self.prompts is None):
            raise ValueError("instructions need seeds, or prompts in their place; set one of them")
        if kind != "instructions" and self.prompts is None:
            raise ValueError(f"{kind} needs prompts: the stage whose prompts are answered")
        if kind != "instructions" and self.seeds is not None:
            raise ValueError(f"seeds are for instructions; {kind} answers prompts")
        labels = [name for name in ("reward", "score", "judge") if getattr(self, name) is not None]
        allowed = {"best_of": ("reward", "score"), "pairs": ("reward", "score", "judge")}.get(kind, ())
        wrong = [name for name in labels if name not in allowed]
        if wrong:
            raise ValueError(f"{kind} has no use for {', '.join(wrong)}")
        if allowed and len(labels) != 1:
            raise ValueError(f"{kind} needs one of {', '.join(allowed)}; {', '.join(labels) or 'none'} set")
        if isinstance(self.task, PairsTask) and self.judge is not None and self.task.min_margin:
            raise ValueError("task.min_margin is a difference of scores, and a judge gives none")
        if self.temperature == 0 and getattr(self.task, "n", 1) > 1:
            raise ValueError("temperature 0 gives the same answer n times; raise it, or set task.n to 1")
        return self

    @model_validator(mode="after")
    def _prices_for_the_budget(self) -> SynthesizeConfig:
        judge = None if self.judge is None else self.judge.endpoint
        given = {name: one for name, one in {"endpoint": self.endpoint, "judge.endpoint": judge}.items() if one}
        if self.max_cost is not None and not given:
            raise ValueError("max_cost is for endpoints; a model of this pipeline has no price")
        if self.max_cost is not None:
            for name, one in given.items():
                if one.price_input is None:
                    raise ValueError(f"max_cost needs {name}.price_input and {name}.price_output")
        return self

    def makes(self) -> Kind:
        """What the task gives."""
        return {"instructions": Kind.PROMPTS, "pairs": Kind.PREFERENCES}.get(self.task.type, Kind.INSTRUCTIONS)

    def identities(self, base: Path) -> dict[str, str]:
        """What stands outside the store: models behind endpoints by name, seeds by content, functions by their code."""
        found = {}
        if self.endpoint is not None:
            found["endpoint"] = canonical(self.endpoint.identity())
        if self.judge is not None:
            asked = self.judge.model_dump(exclude={"endpoint"})
            judge = self.judge.endpoint.identity() if self.judge.endpoint is not None else {}
            found["judge"] = canonical({**asked, **judge})
        if self.seeds is not None:
            path = base / self.seeds
            if not path.is_file():
                raise UserError(f"seeds: there is no file {path}.")
            found["seeds"] = file_digest(path)
        if self.score is not None:
            from align.config.user_functions import function_identity

            found["score"] = function_identity(self.score)
        return found
