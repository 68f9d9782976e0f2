"""Responses of every compared checkpoint, through one rollout engine, kept on disk as they come.

Responses that are on disk already, from an earlier attempt or another run, are not generated again. Leaves out scoring.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from align.config.runtime import Runtime
from align.evaluation.prompts import Policy
from align.inference.protocol import Response, RolloutEngine, Sampling
from align.inference.weights import checkpoint_weights
from align.store.fingerprint import digest
from align.store.sealed import read_entry, write_entry

Responses = list[list[Response]]
"""Per prompt, its samples."""

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Fields of ``config.json`` that say nothing about which weights fit."""

OpenEngine = Callable[[Path, Runtime], RolloutEngine]
Progress = Callable[[int, int], None]


@dataclass
class Generated:
    """Responses of one checkpoint and what made them."""

    engine: str
    responses: Responses


class ResponseCache:
    """``<folder>/<identity>.jsonl``: a header line, one line per prompt, and the seal. A file is whole or absent.

    The identity is a digest of weights, prompts and sampling, so that runs may share the folder.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object]) -> None:
        self.folder, self.warn = folder, warn

    def path(self, identity: str) -> Path:
        """Where the responses lie."""
        return self.folder / f"{identity[:32]}.jsonl"

    def read(self, identity: str) -> Generated | None:
        """The responses stored under the identity; None where there are none, or others than were stored."""
        lines = read_entry(self.path(identity), identity, self.warn)
        if lines is None:
            return None
        header, *responses = lines
        return Generated(header["engine"], [[Response(**item) for item in samples] for samples in responses])

    def write(self, identity: str, generated: Generated) -> None:
        """Store responses; they appear under their name only once all are written."""
        responses = ([asdict(sample) for sample in samples] for samples in generated.responses)
        write_entry(self.path(identity), identity, itertools.chain([{"engine": generated.engine}], responses))


def architecture(model_dir: Path) -> str:
    """What must be equal for an engine to take one checkpoint's weights after another's: shapes and end tokens."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generation = model_dir / "generation_config.json"
    ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    shapes = {key: value for key, value in config.items() if key not in VOLATILE}
    adapter = model_dir / "adapter" / "adapter.json"  # what is stored beside the weights (align.models.tuning.stored)
    inserted = {"adapter": adapter.read_text(encoding="utf-8")} if adapter.is_file() else {}
    return digest({"shapes": json.dumps(shapes, sort_keys=True), "ends": json.dumps(ends)} | inserted)


class Sampler:
    """The one engine of an evaluation: opened for the first checkpoint that must answer, given the weights of the next.

    Checkpoints of several architectures are all answered by the transformers engine: numbers of two engines do not
    compare, and a process can hold only one vLLM. Servers are started anew for each instead.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        runtime: Runtime,
        open_engine: OpenEngine,
        cache: ResponseCache,
        warn: Callable[[str], None],
        progress: Progress,
        precision: str = "bfloat16",
    ) -> None:
        """``open_engine(model_dir, runtime)`` opens an engine that computes in ``precision``; ``progress(done, total)``
        counts responses, ``total`` those that were announced by ``expect``.
        """
        several = len({architecture(policy.model_dir) for policy in policies}) > 1
        if several and runtime.engine.name != "transformers" and not runtime.rollouts.servers:
            warn("the compared checkpoints differ in architecture, so all are sampled with the transformers engine")
            runtime = runtime.with_transformers()
        self.runtime, self.open_engine, self.cache, self.progress = runtime, open_engine, cache, progress
        self.warn = warn
        dtype = precision if runtime.engine.dtype == "auto" else runtime.engine.dtype
        self._made_by = [_engine_name(runtime), dtype]
        self.engines: set[str] = set()
        """Engines that the responses given out came from."""
        self.expected = self.done = self.tokens = 0
        self._engine: RolloutEngine | None = None
        self._kind, self._holds = "", Path()

    def expect(self, responses: int) -> None:
        """Announce so many more responses."""
        self.expected += responses

    def generate(self, policy: Policy, prompts: list[list[int]], sampling: Sampling) -> Generated:
        """Responses of a checkpoint, from the cache or sampled now."""
        identity = digest(
            {
                "key": policy.key,
                "prompts": prompts,
                "sampling": asdict(sampling),
                "engine": self._made_by,
            }
        )
        found = self.cache.read(identity)
        if found is None:
            found = _generate(self._holding(policy), policy, prompts, sampling, self._report)
            self.cache.write(identity, found)
        self.done += len(prompts) * sampling.n
        self.tokens += sum(len(one.token_ids) for samples in found.responses for one in samples)
        self._report(0, 0)
        if self.engines and found.engine not in self.engines:
            self.warn("responses come from different engines (an earlier run used another); do not compare them")
        self.engines.add(found.engine)
        return found

    def _report(self, done: int, _: int) -> None:
        self.progress(self.done + done, max(self.done + done, self.expected))

    def _holding(self, policy: Policy) -> RolloutEngine:
        kind = architecture(policy.model_dir)
        if self._engine is not None and kind == self._kind:
            if self._holds != policy.model_dir:
                self._engine.load_weights(checkpoint_weights(policy.model_dir))
        else:
            self.close()
            self._engine, self._kind = self.open_engine(policy.model_dir, self.runtime), kind
        self._holds = policy.model_dir
        return self._engine

    def close(self) -> None:
        """Free the engine, before models are loaded for their own forward passes."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _engine_name(runtime: Runtime) -> str:
    """The engine that ``auto`` will most likely be: responses of another one are not taken from the cache."""
    if runtime.rollouts.pooled:
        return "vllm-server"
    if runtime.engine.name != "auto":
        return runtime.engine.name
    return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"


def _generate(
    engine: RolloutEngine, policy: Policy, prompts: list[list[int]], sampling: Sampling, progress: Progress
) -> Generated:
    responses = engine.generate(prompts, sampling, progress)
    if len(responses) != len(prompts) or any(len(samples) != sampling.n for samples in responses):
        raise RuntimeError(f"the engine returned other than {sampling.n} responses to each of {len(prompts)} prompts")
    # The engine was opened with another checkpoint's tokenizer: texts are decoded with the policy's own.
    decode = policy.tokenizer.decode
    return Generated(
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
