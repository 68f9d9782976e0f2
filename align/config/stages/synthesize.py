"""Settings of the stage ``synthesize``: instructions, responses or pairs from a model. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, StrictBool, model_validator

from align.config.base import Config, PrecisionSetting, stage_input
from align.config.endpoint import EndpointConfig
from align.config.environment import EnvironmentConfig, take_episode_tokens
from align.config.judge import JudgeConfig
from align.config.located_paths import UserPath
from align.config.scores import Score, rename_score_stages, score_identities
from align.config.simulated_user import rename_user_stage
from align.config.stages.sample import SplitCounts
from align.config.stages.synthesis_tasks import PairsTask, Task
from align.errors import UserError
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind
from align.store.fingerprint import canonical, file_digest


class SynthesizeConfig(Config):
    """The task, the model that answers, and the scorer or judge."""

    task: Task
    """``{type: instructions|responses|best_of|pairs, ...}``."""
    model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint answers, through ``runtime.engine``; null for ``endpoint``."""
    endpoint: EndpointConfig | None = None
    """OpenAI-compatible server that answers, instead of ``model``."""
    prompts: stage_input(*PROMPT_SOURCES) | None = None  # type: ignore[valid-type]
    """Stage with the prompts to answer, both splits; for instructions, its train prompts are the seeds."""
    seeds: UserPath | None = None
    """Seed instructions: a .jsonl file with a field ``instruction``, like self-instruct's seed_tasks.jsonl."""
    environment: EnvironmentConfig | None = None
    """Environment that the model or endpoint acts in over several turns, with tools or by answers. Rows are whole
    episodes. It scores them; ``reward`` or ``score`` read the last turn, and add to that (docs/environments.md)."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Reward stage that scores answers."""
    score: Score = None
    """Function that scores answers (``gold``, ``gsm8k_answer``, or an import path ``module:name``), or a list of
    rewards."""
    judge: JudgeConfig | None = None
    """Judge that compares every two answers in both orders; only for pairs."""
    judge_model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint judges, if ``judge`` has no endpoint."""
    system: str | None = Field(None, min_length=1)
    """System message for prompts that have none; the rows do not contain it."""
    temperature: float = Field(1.0, ge=0, le=5)
    """Divisor of the logits; higher values give more varied answers. 0 is greedy, for ``n: 1``."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens with this total probability; 1 uses all."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens per answer."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer prompts are dropped and counted; only for ``model`` and ``judge_model``, a server has its own limit."""
    max_prompts: SplitCounts = SplitCounts()
    """Most prompts per split: ``{train: 600, test: 100}``."""
    precision: PrecisionSetting = "auto"
    """Type of the matrix products of ``model``, ``judge_model`` and ``reward``; ``auto`` measures the faster one."""
    cache: StrictBool | str = True
    """Cache of answers that stages and runs share: true for the store's cache, a folder for another one, false for
    none. A killed stage always resumes from its own answers."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before the endpoints' total cost exceeds this, by their prices; raise it and run again to continue."""
    on_error: Literal["stop", "drop"] = "stop"
    """Stop, or drop the row, if an endpoint refuses a request or never answers in a readable form. Part of the key."""

    # endpoints, seeds and scorer enter the key through ``identities``; rate, retries and price of requests do not
    # change the result
    identified: ClassVar[frozenset[str]] = frozenset(
        {"endpoint", "environment", "seeds", "score", "judge", "cache", "max_cost"}
    )
    keyed_when_set: ClassVar[frozenset[str]] = frozenset({"environment"})

    @model_validator(mode="after")
    def _one_generator(self) -> SynthesizeConfig:
        if (self.model is None) == (self.endpoint is None):
            have = "both are" if self.model else "neither is"
            raise ValueError(f"either model or endpoint answers; {have} set")
        if self.judge is not None and (self.judge_model is None) == (self.judge.endpoint is None):
            have = "both are" if self.judge_model else "neither is"
            raise ValueError(f"either judge.endpoint or judge_model judges; {have} set")
        if self.judge is None and self.judge_model is not None:
            raise ValueError("judge_model needs `judge: {}` too, with the judge's settings")
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> SynthesizeConfig:
        kind = self.task.type
        if kind == "instructions" and (self.seeds is None) == (self.prompts is None):
            raise ValueError("instructions need either seeds or prompts; set one of them")
        if kind != "instructions" and self.prompts is None:
            raise ValueError(f"{kind} needs prompts: the stage whose prompts are answered")
        if kind != "instructions" and self.seeds is not None:
            raise ValueError(f"seeds are for instructions; {kind} answers prompts")
        labels = [name for name in ("reward", "score", "judge") if getattr(self, name) is not None]
        allowed = {"best_of": ("reward", "score"), "pairs": ("reward", "score", "judge")}.get(kind, ())
        wrong = [name for name in labels if name not in allowed]
        if wrong:
            raise ValueError(f"{kind} does not use {', '.join(wrong)}")
        if self.environment is not None:
            self._check_environment(labels)
        elif allowed and len(labels) != 1:
            raise ValueError(f"{kind} needs one of {', '.join(allowed)}; {', '.join(labels) or 'none'} set")
        if isinstance(self.task, PairsTask) and self.judge is not None and self.task.min_margin:
            raise ValueError("task.min_margin is a difference of scores, and a judge gives none")
        if self.temperature == 0 and getattr(self.task, "n", 1) > 1:
            raise ValueError("temperature 0 gives the same answer n times; raise it, or set task.n to 1")
        return self

    def _check_environment(self, labels: list[str]) -> None:
        """Raise ``ValueError`` for a task without episodes, and for what cannot score them."""
        if self.task.type == "instructions":
            raise ValueError(
                "environment plays episodes from prompts, and instructions writes new prompts; remove it here, and set "
                "it in a stage that answers them (responses, best_of, pairs)"
            )
        if self.endpoint is not None and "tools" in self.endpoint.extra:
            raise ValueError("endpoint.extra sets tools, which are those of the environment; remove them")
        if self.judge is not None:
            raise ValueError("judge compares single answers, and an environment scores its episodes; remove judge")
        if len(labels) > 1:
            raise ValueError("both score and reward are set; beside an environment at most one of them scores")

    @model_validator(mode="after")
    def _use_the_tokens_of_episodes(self) -> SynthesizeConfig:
        take_episode_tokens(self)
        return self

    @model_validator(mode="after")
    def _prices_for_the_budget(self) -> SynthesizeConfig:
        judge = None if self.judge is None else self.judge.endpoint
        endpoints = {"endpoint": self.endpoint, "judge.endpoint": judge}
        endpoints = {name: endpoint for name, endpoint in endpoints.items() if endpoint}
        if self.max_cost is not None and not endpoints:
            raise ValueError("max_cost is for endpoints; a model of this pipeline has no price")
        if self.max_cost is not None:
            for name, endpoint in endpoints.items():
                if endpoint is not None and endpoint.price_input is None:
                    raise ValueError(f"max_cost needs {name}.price_input and {name}.price_output")
        return self

    def makes(self) -> Kind:
        """Return the kind of data that the task makes."""
        return {"instructions": Kind.PROMPTS, "pairs": Kind.PREFERENCES}.get(self.task.type, Kind.INSTRUCTIONS)

    def identities(self, base: Path) -> dict[str, str]:
        """Return identities of endpoints' models (by name), seeds (by content), functions and environment (by code)."""
        identities = {}
        if self.environment is not None:
            identities["environment"] = self.environment.identity()
        if self.endpoint is not None:
            identities["endpoint"] = canonical(self.endpoint.identity())
        if self.judge is not None:
            # The judge's settings without its address: the same model elsewhere gives the same verdicts.
            settings = self.judge.model_dump(exclude={"endpoint"})
            judge = self.judge.endpoint.identity() if self.judge.endpoint is not None else {}
            identities["judge"] = canonical({**settings, **judge})
        if self.seeds is not None:
            path = base / self.seeds
            if not path.is_file():
                raise UserError(f"seeds: there is no file {path}.")
            identities["seeds"] = file_digest(path)
        return identities | score_identities(self.score)

    @classmethod
    def rename_stages(cls, block: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
        """Return the block as the YAML has it, with the stages that its ``score`` and ``environment`` name renamed."""
        return rename_user_stage(rename_score_stages(block, rename), rename)
