"""Responses of every compared checkpoint, through one rollout engine, kept on disk as they come.

A process can hold one vLLM engine only: it is opened for the first checkpoint and given the weights of the next. A
checkpoint whose responses are on disk already is not generated again. Leaves out scoring.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from align.evaluation.prompts import Policy
from align.fingerprint import digest
from align.rollouts.protocol import Response, RolloutEngine, Sampling
from align.rollouts.weights import checkpoint_weights
from align.stage import Runtime

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
    """``<folder>/responses-<policy>.jsonl``: a header line, then one line per prompt. A file is whole or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, policy: str) -> Path:
        """Where the responses of a policy lie."""
        return self.folder / f"responses-{policy}.jsonl"

    def read(self, policy: str, identity: str) -> Generated | None:
        """The responses stored under the same identity (weights, prompts, sampling), or None."""
        try:
            with self.path(policy).open(encoding="utf-8") as file:
                header = json.loads(next(file))
                if header.get("identity") != identity:
                    return None
                return Generated(header["engine"], [[Response(**item) for item in json.loads(line)] for line in file])
        except (FileNotFoundError, StopIteration, ValueError, KeyError, TypeError):
            return None

    def write(self, policy: str, identity: str, generated: Generated) -> None:
        """Store responses; they appear under their name only once all are written."""
        draft = self.path(policy).with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"identity": identity, "engine": generated.engine}) + "\n")
            for samples in generated.responses:
                file.write(json.dumps([asdict(sample) for sample in samples]) + "\n")
        draft.replace(self.path(policy))


def architecture(model_dir: Path) -> str:
    """What must be equal for an engine to take one checkpoint's weights after another's: shapes and end tokens."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generation = model_dir / "generation_config.json"
    ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    shapes = {key: value for key, value in config.items() if key not in VOLATILE}
    return digest({"shapes": json.dumps(shapes, sort_keys=True), "ends": json.dumps(ends)})


def generate_all(
    policies: list[Policy],
    prompts: Mapping[str, list[list[int]]],
    sampling: Sampling,
    runtime: Runtime,
    open_engine: OpenEngine,
    cache: ResponseCache,
    progress: Progress,
    warn: Callable[[str], None],
) -> dict[str, Generated]:
    """Responses of every policy to its own rendering of the same prompts, by policy name.

    ``open_engine(model_dir, runtime)`` opens an engine; ``progress(done, total)`` counts responses over all policies.
    Checkpoints of several architectures are all answered by the transformers engine: numbers of two engines do not
    compare, and a process can hold only one vLLM.
    """
    if len({architecture(policy.model_dir) for policy in policies}) > 1 and runtime.engine.name != "transformers":
        warn("the compared checkpoints differ in architecture, so all are sampled with the transformers engine")
        runtime = runtime.model_copy(update={"engine": runtime.engine.model_copy(update={"name": "transformers"})})
    total = sum(len(ids) for ids in prompts.values()) * sampling.n
    found: dict[str, Generated] = {}
    engine, opened_for, done = None, "", 0
    try:
        for policy in policies:
            ids = prompts[policy.name]
            identity = digest({"key": policy.key, "prompts": ids, "sampling": asdict(sampling)})
            kept = cache.read(policy.name, identity)
            if kept is None:
                kind = architecture(policy.model_dir)
                if engine is not None and kind == opened_for:
                    engine.load_weights(checkpoint_weights(policy.model_dir))
                else:
                    if engine is not None:
                        engine.close()
                    engine, opened_for = open_engine(policy.model_dir, runtime), kind
                kept = _generate(engine, policy, ids, sampling, _offset(progress, done, total))
                cache.write(policy.name, identity, kept)
            done += len(ids) * sampling.n
            progress(done, total)
            found[policy.name] = kept
    finally:
        if engine is not None:
            engine.close()
    if len({one.engine for one in found.values()}) > 1:
        warn("responses come from different engines (an earlier attempt used another); rebuild the stage to compare")
    return found


def _offset(progress: Progress, before: int, total: int) -> Progress:
    """Progress of one checkpoint as progress of all."""
    return lambda done, _: progress(before + done, total)


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
