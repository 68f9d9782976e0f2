"""One vLLM engine that reads checkpoint after checkpoint.

``python -m tests.support.stages.vllm_reader policy|reward FOLDER QUESTIONS ANSWERS`` answers every folder that comes as
a line of the pipe ``QUESTIONS`` by a line which says in JSON how far vLLM is from transformers. The engine opens on
``FOLDER``. A reward model is read as its users would, by vLLM's own ``LLM``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from align.config.runtime import EngineConfig, Runtime
from align.inference.engine import open_engine
from align.inference.vllm import VllmEngine, why_unusable
from align.inference.vllm_internals import model_runner
from align.inference.weights import checkpoint_weights
from align.models.loading import load_policy
from align.models.reward import RewardModel
from tests.support.inference.vllm_adapter_checks import difference

HALF = 2
"""A place in a row where a process model could have a step's mark."""
ROWS = [[1, 30 + i, 31, 32 + i] + [40 + i] * (3 * i) + [2] for i in range(6)]


class Policies:
    """Log-probabilities of what vLLM samples, and of the same tokens given to it, against transformers'."""

    def __init__(self, folder: Path) -> None:
        runtime = Runtime(engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1), threads=1)
        engine = open_engine(folder, runtime, precision="float32", max_length=128, seed=7, warn=print)
        assert isinstance(engine, VllmEngine)
        self.engine, self.start = engine, load_policy(folder)

    def read(self, folder: Path) -> dict[str, float]:
        self.engine.load_weights(checkpoint_weights(folder))
        return {
            "apart": difference(self.engine, load_policy(folder)),
            "moved": difference(self.engine, self.start),
        }


class Rewards:
    """Scores of whole conversations, and of their beginnings, against transformers' at the end and on the way."""

    def __init__(self, folder: Path) -> None:
        reason = why_unusable()  # sets up the environment, too
        assert reason is None, reason
        from vllm import LLM

        self.llm = LLM(
            model=str(folder), runner="pooling", dtype="float32", max_model_len=128, max_num_seqs=8, enforce_eager=True,
            enable_prefix_caching=False, kv_cache_memory_bytes=2**26, block_size=32,
        )  # fmt: skip
        self.start = self.ours(folder)

    def ours(self, folder: Path) -> list[float]:
        scores = RewardModel(folder, precision="float32").score_places(ROWS, [[HALF, len(row) - 1] for row in ROWS])
        return [score for row in scores for score in row]

    def read(self, folder: Path) -> dict[str, float]:
        model_runner(self.llm).reload_weights(weights_iterator=checkpoint_weights(folder))
        rows = [cut for row in ROWS for cut in (row[: HALF + 1], row)]
        results = self.llm.classify([{"prompt_token_ids": row} for row in rows], use_tqdm=False)
        scores = [result.outputs.probs[0] for result in results]
        return {"apart": largest(scores, self.ours(folder)), "moved": largest(scores, self.start)}


def largest(result: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(result, expected, strict=True))


def main(kind: str, folder: Path, questions: Path, answers: Path) -> None:
    reader = Policies(folder) if kind == "policy" else Rewards(folder)
    with questions.open() as asked, answers.open("w") as told:
        for line in asked:
            print(json.dumps(reader.read(Path(line.strip()))), file=told, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
