"""What an evaluation is to do, and what its systems said. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from align.evaluation.comparisons import Resampling
from align.evaluation.gates import Gate
from align.evaluation.generation import Generated
from align.evaluation.prompts import Policy
from align.evaluation.systems import System
from align.evaluation.tasks.base import Answers, Task
from align.inference.protocol import Sampling

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is evaluated on what; ``rows`` (the prompt set), ``tasks``, ``pairs`` and ``heldout`` may be empty."""

    systems: list[System]
    reference: str
    base: str | None
    rows: list[Row]
    prompts: dict[str, list[list[int]]]
    """The prompt set as each system reads it."""
    sampling: Sampling
    scorer: Any
    scorer_identity: str
    pairs: list[Row]
    heldout: list[Row]
    heldout_length: int
    precision: Literal["bfloat16", "float32"]
    resampling: Resampling
    longest: int
    """Tokens that the engine must hold, prompt and response together."""
    tasks: list[Task] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    @property
    def policies(self) -> list[Policy]:
        """The checkpoints behind the systems, each once."""
        return list({system.policy.name: system.policy for system in self.systems}.values())


@dataclass
class Answered:
    """What the systems said: to the prompt set, and to each task."""

    generated: dict[str, Generated]
    answers: dict[str, dict[str, Answers]]
    engines: list[str]
    tokens: int
