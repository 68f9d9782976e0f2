"""Compared systems: checkpoints as they are, and ways to use one without training it (prompted, best of N, again).

A fine-tuned model should beat a prompted one, and PPO should beat the best of N answers of the model it started from,
chosen by the same reward model. The same checkpoint sampled again shows how far numbers move by chance.
Torch-free.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from align.config.runtime import Runtime
from align.config.stages.evaluate import BaselineConfig
from align.config.user_paths import user_path
from align.data.rows import Message, assistant, user
from align.errors import UserError
from align.evaluation.answers import Example, ResponseSet
from align.evaluation.scorecard import SystemInfo
from align.inference.engine import SwitchingEngine, architecture
from align.inference.protocol import Response, RolloutEngine, Sampling
from align.inference.thoughts import ThoughtReader, generate
from align.models.chat.render import render_prompt
from align.store.fingerprint import digest, file_digest
from align.store.json_files import numbered_lines, read_entry, write_entry

OpenEngine = Callable[[Path, Runtime], RolloutEngine]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Policy:
    """One compared checkpoint: its stage's name, its folder, the digest of its files, and its tokenizer."""

    name: str
    model_dir: Path
    key: str
    tokenizer: Any


@dataclass(frozen=True)
class System:
    """One compared system."""

    info: SystemInfo
    policy: Policy
    """The checkpoint that answers; its ``name`` is the stage's."""
    own_examples: tuple[Example, ...] = ()
    """Examples of the baseline's file, which precede a task's."""
    temperature: float = 1.0
    sample_seed: int | None = None
    fallback: tuple[Example, ...] = ()
    """Examples for tasks that have too few."""

    @property
    def name(self) -> str:
        """Name in the scorecard."""
        return self.info.name

    @cached_property
    def is_plain(self) -> bool:
        """True if conversations reach the checkpoint as they are."""
        return not self.info.system and not self.info.shots

    def conversation(self, messages: Sequence[Message], examples: Sequence[Example] = ()) -> list[Message]:
        """Return ``messages`` after this system's own prompt. Raises ``UserError`` if there are too few examples.

        ``examples`` are the task's.
        """
        if self.is_plain:
            return list(messages)
        count = self.info.shots
        # In this order: the baseline's own file, the task's examples, and the prompt set's.
        available = self.own_examples or (examples if len(examples) >= count else self.fallback)
        shots = list(available)[:count]
        if len(shots) < count:
            most = max(len(available), len(examples))
            raise UserError(
                f"baselines.{self.name}: shots is {count}, but there are {most} examples to show; name "
                "a file of them as `examples`, or give the task an examples_files (prompts: a stage of instructions)."
            )
        rest = list(messages)
        system = self.info.system
        # One system message: the baseline's text first, then the conversation's.
        opening: list[Message] = []
        if rest and rest[0]["role"] == "system":
            first = rest.pop(0)
            opening = [{"role": "system", "content": f"{system}\n\n{first['content']}"} if system else first]
        elif system:
            opening = [{"role": "system", "content": system}]
        turns = [turn for example in shots for turn in (user(example.question), assistant(example.answer))]
        return [*opening, *turns, *rest]

    def render(
        self, messages: Sequence[Message], examples: Sequence[Example] = (), tools: str | None = None
    ) -> list[int]:
        """Return the token ids of the prompted conversation, up to the answer's start."""
        return render_prompt(self.policy.tokenizer, self.conversation(messages, examples), tools)

    def sampling(self, sampling: Sampling) -> Sampling:
        """Return the sampling for the engine: N times the samples, never greedy, for best of N; else as it is.

        A system that is sampled again gets its own seeds.
        """
        if self.sample_seed is not None:
            # Derive the seed from both seeds, so two baselines with different seeds differ in every task.
            seed = int(digest([sampling.seed, self.sample_seed])[:15], 16)
            seeds = None
            if sampling.seeds is not None:
                seeds = tuple(int(digest([seed, prompt_seed])[:15], 16) for prompt_seed in sampling.seeds)
            return replace(sampling, seed=seed, seeds=seeds)
        if self.info.best_of == 1:
            return sampling
        # Greedy decoding would give the same answer N times.
        temperature = sampling.temperature or self.temperature
        return replace(sampling, temperature=temperature, n=sampling.n * self.info.best_of)


def make_systems(
    policies: Sequence[Policy],
    base: str | None,
    baselines: dict[str, BaselineConfig],
    folder: Path,
    fallback: Sequence[Example] = (),
) -> list[System]:
    """Return the checkpoints in their order, then the baselines; ``fallback`` are examples for tasks with too few."""
    by_name = {policy.name: policy for policy in policies}
    systems = []
    for policy in policies:
        role: Literal["base", "checkpoint"] = "base" if policy.name == base else "checkpoint"
        systems.append(System(SystemInfo(policy.name, policy.name, role, policy.key), policy))
    for name, config in baselines.items():
        policy = by_name[config.of]
        examples = tuple(read_examples(config, folder))
        used = [[example.question, example.answer] for example in examples[: config.shots]]
        used_fallback = []
        if not examples:
            used_fallback = [[example.question, example.answer] for example in fallback[: config.shots]]
        key = digest(
            [
                policy.key,
                # The key covers only the examples that are shown, so lines added to a file change no result.
                config.system,
                config.shots,
                used,
                used_fallback,
                config.best_of,
                config.temperature,
                config.sample_seed,
            ]
        )
        info = SystemInfo(name, config.of, _role(config), key, config.system, config.shots, config.best_of)
        systems.append(System(info, policy, examples, config.temperature, config.sample_seed, tuple(fallback)))
    return systems


def _role(config: BaselineConfig) -> Literal["prompted", "best_of", "again"]:
    if config.best_of > 1:
        return "best_of"
    return "prompted" if config.system or config.shots else "again"


def best_of_kl(n: int) -> float:
    """Upper bound on the KL of best-of-N from its sampling policy, in nats: log N - (N - 1)/N (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def example_identities(config: BaselineConfig, base: Path) -> dict[str, str]:
    """Return the digest of a baseline's examples file; empty without one."""
    if config.examples is None:
        return {}
    return {"examples": file_digest(_examples_path(config, base))}


def read_examples(config: BaselineConfig, base: Path) -> list[Example]:
    """Return the examples of a baseline's file; empty without a file.

    Raises ``UserError`` for fewer examples than ``shots`` and for records without both fields.
    """
    if config.examples is None:
        return []
    path = _examples_path(config, base)
    examples = []
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line)
            question = _first_text(record, "question", "prompt")
            examples.append(Example(question, _first_text(record, "answer", "completion")))
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}:{number}: expected a JSON object with the texts question and answer (or prompt and "
                "completion)."
            ) from None
    if len(examples) < config.shots:
        raise UserError(f"{path} has {len(examples)} examples, shots is {config.shots}; lower shots or add examples.")
    return examples


def _examples_path(config: BaselineConfig, base: Path) -> Path:
    path = user_path(str(config.examples), base)
    if not path.is_file():
        raise UserError(f"examples: there is no file '{path}'; relative paths start at the current folder.")
    return path


def _first_text(record: dict[str, Any], *names: str) -> str:
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise KeyError(names[0])


class ResponseCache:
    """Files ``<folder>/<identity>.jsonl``: a header line, one line per prompt, and the seal; written atomically.

    The identity is a digest of weights, prompts and sampling, so runs may share the folder.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object]) -> None:
        self.folder = folder
        self.warn = warn

    def path(self, identity: str) -> Path:
        """Return the file of an identity."""
        return self.folder / f"{identity[:32]}.jsonl"

    def read(self, identity: str) -> ResponseSet | None:
        """Return the responses stored under the identity; None if there are none, or the file is damaged."""
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
        thinking_budget: int | None = None,
    ) -> None:
        """``open_engine(model_dir, runtime)`` opens an engine that computes in ``precision``; ``progress(done, total)``
        counts responses, ``total`` those announced to ``expect``. Thoughts are closed after ``thinking_budget`` tokens.
        """
        self.thinking_budget = thinking_budget
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
        self.identity = [runtime.engine_name, dtype]
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
        sampling = replace(sampling, thinking_budget=self.thinking_budget)
        # Everything that changes the responses: weights, token ids, sampling, and the engine with its precision.
        identity = digest(
            {
                "key": policy.key,
                "prompts": prompts,
                "sampling": sampling.settings(),
                "engine": self.identity,
            }
        )
        response_set = self.cache.read(identity)
        if response_set is None:
            response_set = _generate(self.engine_with(policy), policy, prompts, sampling, self.report)
            self.cache.write(identity, response_set)
        # Responses of earlier versions were stored without their thoughts.
        reader = ThoughtReader(policy.tokenizer)
        response_set.responses = [
            [reader.read(ids, response) for response in samples]
            for ids, samples in zip(prompts, response_set.responses, strict=True)
        ]
        tokens = sum(len(response.token_ids) for samples in response_set.responses for response in samples)
        self.count(len(prompts) * sampling.n, tokens, response_set.engine)
        return response_set

    def engine_with(self, policy: Policy) -> RolloutEngine:
        """Return the engine with a checkpoint's weights, until another checkpoint's weights are requested."""
        return self._engine.with_weights(policy.model_dir)

    def count(self, responses: int, tokens: int, engine: str) -> None:
        """Count responses or episodes that an engine sampled, now or in an earlier run."""
        self.done += responses
        self.tokens += tokens
        self.report(0, 0)
        if self.engines and engine not in self.engines:
            self.warn("responses come from different engines (an earlier run used another); do not compare them")
        self.engines.add(engine)

    def report(self, completed: int, _: int) -> None:
        """Report progress within the responses that are being sampled."""
        self.progress(self.done + completed, max(self.done + completed, self.expected))

    def close(self) -> None:
        """Free the engine, before models are loaded for their own forward passes."""
        self._engine.close()


def _generate(
    engine: RolloutEngine, policy: Policy, prompts: list[list[int]], sampling: Sampling, progress: Progress
) -> ResponseSet:
    responses = generate(engine, ThoughtReader(policy.tokenizer), prompts, sampling, progress)
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
                    forced=sample.forced,
                )
                for sample in samples
            ]
            for samples in responses
        ],
    )
