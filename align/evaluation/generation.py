"""Responses of every compared checkpoint, from one rollout engine and a cache on disk.

Responses in the cache, from an earlier attempt or another run, are not generated again.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from align.config.runtime import Runtime
from align.evaluation.systems import Policy
from align.evaluation.tasks.base import Answers, Episodes
from align.inference.protocol import Response, RolloutEngine, Sampling
from align.inference.switching import SwitchingEngine, architecture
from align.store.fingerprint import digest
from align.store.sealed import read_entry, write_entry

OpenEngine = Callable[[Path, Runtime], RolloutEngine]
Progress = Callable[[int, int], None]


@dataclass
class ResponseSet:
    """One system's responses to a list of prompts, and the engine that sampled them."""

    engine: str
    responses: list[list[Response]]
    """Per prompt, its samples."""


@dataclass
class SystemResponses:
    """All systems' responses: to the prompt set, and to each task."""

    prompt_set: dict[str, ResponseSet] = field(default_factory=dict)
    """System → its responses to the prompt set."""
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    """Task → system → its answers."""
    episodes: dict[str, dict[str, Episodes]] = field(default_factory=dict)
    """Task → system → its episodes, for tasks with an environment."""
    engines: list[str] = field(default_factory=list)
    tokens: int = 0


class ResponseCache:
    """Files ``<folder>/<identity>.jsonl``: a header line, one line per prompt, and the seal; written atomically.

    The identity is a digest of weights, prompts and sampling, so that runs may share the folder.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object]) -> None:
        self.folder, self.warn = folder, warn

    def path(self, identity: str) -> Path:
        """Return the file of an identity."""
        return self.folder / f"{identity[:32]}.jsonl"

    def read(self, identity: str) -> ResponseSet | None:
        """Return the responses stored under the identity; None where there are none, or the file is damaged."""
        lines = read_entry(self.path(identity), identity, self.warn)
        if lines is None:
            return None
        header, *responses = lines
        return ResponseSet(header["engine"], [[Response(**item) for item in samples] for samples in responses])

    def write(self, identity: str, response_set: ResponseSet) -> None:
        """Store responses atomically."""
        responses = ([asdict(sample) for sample in samples] for samples in response_set.responses)
        write_entry(self.path(identity), identity, itertools.chain([{"engine": response_set.engine}], responses))


class Sampler:
    """The one engine of an evaluation: opened for the first checkpoint, then loaded with the weights of the next.

    Checkpoints of several architectures are all sampled with the transformers engine: numbers of two engines do not
    compare, and a process can hold only one vLLM. Servers are restarted for each architecture instead.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        runtime: Runtime,
        open_engine: OpenEngine,
        cache: ResponseCache,
        *,
        warn: Callable[[str], None],
        progress: Progress,
        precision: str = "bfloat16",
    ) -> None:
        """``open_engine(model_dir, runtime)`` opens an engine that computes in ``precision``; ``progress(done, total)``
        counts responses, ``total`` those announced to ``expect``.
        """
        # A process can hold one vLLM only, and numbers of two engines do not compare: transformers samples all.
        several = len({architecture(policy.model_dir) for policy in policies}) > 1
        if several and runtime.engine.name != "transformers" and not runtime.rollouts.servers:
            warn("the compared checkpoints differ in architecture, so all are sampled with the transformers engine")
            runtime = runtime.with_transformers()
        self.runtime = runtime
        self.cache = cache
        self.progress = progress
        self.warn = warn
        dtype = precision if runtime.engine.dtype == "auto" else runtime.engine.dtype
        self.identity = [_engine_name(runtime), dtype]
        """The engine and its precision, as far as samples depend on them."""
        self.engines: set[str] = set()
        """Engines of all responses so far."""
        self.expected = self.done = self.tokens = 0
        self._engine = SwitchingEngine(lambda model_dir: open_engine(model_dir, runtime))

    def expect(self, responses: int) -> None:
        """Announce so many more responses."""
        self.expected += responses

    def generate(self, policy: Policy, prompts: list[list[int]], sampling: Sampling) -> ResponseSet:
        """Return a checkpoint's responses, from the cache or sampled now."""
        # Everything that changes the responses: weights, token ids, sampling, and the engine with its precision.
        identity = digest(
            {
                "key": policy.key,
                "prompts": prompts,
                "sampling": asdict(sampling),
                "engine": self.identity,
            }
        )
        response_set = self.cache.read(identity)
        if response_set is None:
            response_set = _generate(self.engine_with(policy), policy, prompts, sampling, self.report)
            self.cache.write(identity, response_set)
        tokens = sum(len(response.token_ids) for samples in response_set.responses for response in samples)
        self.count(len(prompts) * sampling.n, tokens, response_set.engine)
        return response_set

    def engine_with(self, policy: Policy) -> RolloutEngine:
        """Return the engine with a checkpoint's weights, until those of the next are asked for."""
        return self._engine.with_weights(policy.model_dir)

    def count(self, responses: int, tokens: int, engine: str) -> None:
        """Count responses or episodes that an engine sampled, now or in an earlier run."""
        self.done += responses
        self.tokens += tokens
        self.report(0, 0)
        if self.engines and engine not in self.engines:
            self.warn("responses come from different engines (an earlier run used another); do not compare them")
        self.engines.add(engine)

    def report(self, done: int, _: int) -> None:
        """Report progress within the responses that are being sampled."""
        self.progress(self.done + done, max(self.done + done, self.expected))

    def close(self) -> None:
        """Free the engine, before models are loaded for their own forward passes."""
        self._engine.close()


def _engine_name(runtime: Runtime) -> str:
    """Return the engine that ``auto`` most likely selects; cached responses of another engine are not used."""
    if runtime.rollouts.pooled:
        return "vllm-server"
    if runtime.engine.name != "auto":
        return runtime.engine.name
    return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"


def _generate(
    engine: RolloutEngine, policy: Policy, prompts: list[list[int]], sampling: Sampling, progress: Progress
) -> ResponseSet:
    responses = engine.generate(prompts, sampling, progress)
    if len(responses) != len(prompts) or any(len(samples) != sampling.n for samples in responses):
        raise RuntimeError(f"the engine returned other than {sampling.n} responses to each of {len(prompts)} prompts")
    # The engine was opened with another checkpoint's tokenizer: texts are decoded with the policy's own.
    decode = policy.tokenizer.decode
    return ResponseSet(
        engine.name,
        [
            [
                Response(
                    token_ids=[int(token) for token in sample.token_ids],
                    logprobs=[float(value) for value in sample.logprobs],
                    finished=bool(sample.finished),
                    text=decode(sample.token_ids, skip_special_tokens=True),
                )
                for sample in samples
            ]
            for samples in responses
        ],
    )
