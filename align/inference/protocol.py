"""The protocol of rollout engines, and a timeout for calls to an engine in this process. Torch-free.

A thread next to each call counts the seconds without progress. When they reach ``runtime.engine.timeout`` it writes a
message and the stacks of all threads to standard error, and calls ``on_hang``. A stage ends its process there, as
failed, and is resumed from its last checkpoint (``StageContext.fail_at_once``). In a notebook or a script there is no
``on_hang``: the user reads the message and decides. Servers need no watchdog: their client bounds every call
(``server_client.py``).

Leaves out nested calls, and calls by two threads at once. Time in which the whole process was stopped does not count,
unless it exceeds twice the timeout within one call: then Python's own timer ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from align.config.runtime import EngineConfig, Runtime
from align.data.final_answers import AnswerText

if TYPE_CHECKING:
    import torch

    from align.config.base import Precision

Progress = Callable[[int, int], None]
"""The callback gets (responses finished, responses wanted)."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    """Below 1 the tail is cut and ``logprobs`` are renormalized over what is kept: leave it at 1 for training."""
    n: int = 1
    """Responses per prompt."""
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    """A seed per prompt instead of ``seed`` and its index: its responses are then the same in any list of prompts."""
    thinking_budget: int | None = None
    """Tokens after which a thought is closed by force; only ``align.inference.thoughts`` reads it."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON, without those that were added later and are not set."""
        settings = asdict(self)
        if self.thinking_budget is None:
            del settings["thinking_budget"]
        return settings

    def request_seed(self, prompt: int, sample: int) -> int:
        """Return the seed of one response, from ``seed`` and the response's index: batching does not change it."""
        seed = self.seed
        index = prompt
        if self.seeds is not None:
            seed = self.seeds[prompt]
            index = 0
        text = f"{seed}/{index}/{sample}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1  # non-negative int64


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    token_ids: list[int]
    """Sampled tokens, the end-of-turn token included when there is one."""
    logprobs: list[float]
    """The engine's log-probability of each token, after temperature (``sampler_logprobs``)."""
    finished: bool
    """True when the end-of-turn token was sampled, False when the length limit cut it off."""
    text: str
    """The tokens decoded, special ones omitted."""
    weights_update: int | None = None
    """Update whose weights sampled it, if they may change while a session is open; None if they stay."""
    thought_tokens: int = 0
    """Tokens of the thought that the response begins with, its marks included."""
    thought_end: int = 0
    """Characters of ``text`` before the answer."""
    is_open: bool = False
    """True if the response ends inside its thought, so it has no answer."""
    bare_thought: str | None = None
    """The thought without its marks, if ``text`` does not show where it ends; otherwise None."""
    forced: list[int] = field(default_factory=list)
    """Positions of the tokens that a thinking budget forced; their log-probabilities are 0 and they are not learned."""

    @property
    def answer_text(self) -> AnswerText:
        """The answer after the thought."""
        return AnswerText.cut(self.text, self.thought_end, self.is_open)

    @property
    def marked_thought(self) -> str:
        """The thought with marks that show where it ends, also if the marks of the model are no part of ``text``."""
        if self.bare_thought is None:
            return self.text[: self.thought_end]
        if not self.bare_thought:
            return ""
        return f"<think>\n{self.bare_thought}" + ("" if self.is_open else "\n</think>\n\n")

    @property
    def marked_text(self) -> str:
        """``marked_thought`` and the answer."""
        return self.marked_thought + self.answer_text

    @property
    def answer_tokens(self) -> int:
        """Number of tokens after the thought."""
        return len(self.token_ids) - self.thought_tokens

    @property
    def mask(self) -> list[bool]:
        """True on the tokens that were sampled, (T,)."""
        forced = set(self.forced)
        return [position not in forced for position in range(len(self.token_ids))]


@dataclass(frozen=True)
class TurnRequest:
    """One turn of an episode that a session samples."""

    key: int
    """Number of the episode, under which the turn comes back. Of one episode at most one turn is in flight."""
    prompt: list[int]
    """Everything before the turn, earlier turns included."""
    max_tokens: int
    seed: int
    """Seed of the turn's own generator, a non-negative int64 such as ``Sampling.request_seed`` returns."""


@dataclass(frozen=True)
class EngineSpec:
    """Model, settings and limits of an engine."""

    model_dir: Path
    runtime: Runtime
    precision: Precision
    max_length: int
    """Tokens of a prompt and its response together, at most."""
    seed: int


class RolloutEngine(Protocol):
    """vLLM or transformers, in this process or elsewhere. The rest of align does not depend on which."""

    name: str
    dtype: torch.dtype
    """Compute type; the parity probe's tolerance follows from it."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Return ``sampling.n`` responses for each prompt, in the order of ``prompts``."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a full set of weights under their transformers names, and drop every cached prefix.

        ``policy_weights(model)`` of ``align.inference.trainer_engine`` gives them: an engine that has their base loads
        the adapter only. Each tensor has the shape that the checkpoint gives its name. Raises ``ValueError`` when one
        is missing.
        """

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Return the engine's log-probabilities of response tokens, which the parity probe compares."""

    def close(self) -> None:
        """Free the model and the cache."""


@runtime_checkable
class BatchEngine(Protocol):
    """An engine that samples turns in batches: transformers, or the engines of a Ray cluster."""

    def sample(self, requests: list[TurnRequest], temperature: float, top_p: float) -> list[Response]:
        """Return the responses to ``requests``, in their order; each has its own seed and limit."""
        ...


class Session(Protocol):
    """Turns of many episodes, each sampled as soon as it is submitted. Use a session from one thread.

    ``align.inference.sessions.open_session`` opens one. Between opening and closing it the engine is used for nothing
    else while a turn is in flight. Its weights stay, but for those that a pool of servers was offered.
    """

    is_lockstep: bool
    """True where ``poll`` samples all that was submitted as batches: submit every turn that is ready first."""

    @property
    def pending(self) -> int:
        """Turns that were submitted and have not come back."""
        ...

    def submit(self, request: TurnRequest) -> None:
        """Take a turn.

        Raises ``ValueError`` for a turn that cannot be sampled, or whose episode has another turn in flight.
        """
        ...

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return finished turns by key: waits for the first, and returns none after ``timeout`` seconds.

        Without a turn in flight the call returns at once. A timeout is looked at between two decoding steps.
        """
        ...

    def cache_statistics(self) -> dict[str, float] | None:
        """Return ``prefix_hit_rate``, the share of prompt tokens that was in the engine's cache.

        Counts the turns that came back. None if the engine has no such cache or does not report it.
        """
        return None

    def close(self) -> None:
        """Abort what is in flight, and let the engine sleep if it does after ``generate``."""
        return


def check_idle(session: Session | None, call: str) -> None:
    """Raise ``RuntimeError`` if an engine is called while its open session has turns in flight."""
    if session is not None and session.pending:
        raise RuntimeError(f"'{call}' was called while {session.pending} turns of a session are in flight")


OnHang = Callable[[str], None]
"""The function gets the message; need not return."""

TICKS = 20
"""Looks at the call per timeout."""
MAX_TICK_SECONDS = 5.0
"""Seconds between two looks, at most."""


class Watchdog:
    """Watches one engine's calls, one at a time."""

    def __init__(self, engine: str, timeout: float | None = None, on_hang: OnHang | None = None) -> None:
        """``timeout`` is seconds without progress, by default ``EngineConfig``'s timeout."""
        self.engine = engine
        self.on_hang = on_hang
        self.timeout: float = EngineConfig().timeout if timeout is None else timeout
        self._progress = 0

    def progress(self) -> None:
        """Restart the clock: the call has made another token of each sequence, or loaded another tensor."""
        self._progress += 1

    @contextlib.contextmanager
    def watch(self, call: str) -> Iterator[None]:
        """Watch the code inside; ``call`` names it in messages."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._wait, args=(call, ended), name="engine-watchdog", daemon=True)
        self._arm_backstop()
        watcher.start()
        try:
            yield
        finally:
            # The watcher is joined, so none reports a hang after the call has ended.
            ended.set()
            watcher.join()
            if self.on_hang is not None:
                faulthandler.cancel_dump_traceback_later()

    def _wait(self, call: str, ended: threading.Event) -> None:
        tick = min(self.timeout / TICKS, MAX_TICK_SECONDS)
        seconds = 0.0
        last_progress = self._progress
        while seconds < self.timeout:
            began = time.monotonic()
            if ended.wait(tick):
                return
            # A process that was stopped, or starved, for an hour has not waited for its engine that long.
            seconds += min(time.monotonic() - began, 2 * tick)
            # Any progress since the last look restarts the count.
            if self._progress != last_progress:
                seconds = 0.0
                last_progress = self._progress
            self._arm_backstop()
        self._report_hang(call, seconds)

    def _arm_backstop(self) -> None:
        """Set Python's own timer, for a call that hangs while it holds the interpreter's lock.

        Such a call keeps the watching thread from running at all. The timer needs no lock: it dumps the stacks and ends
        the process with exit code 1, without our message. There is one such timer per process, so it is only set in a
        process that may be ended.
        """
        if self.on_hang is not None:
            faulthandler.dump_traceback_later(2 * self.timeout, exit=True, file=_stream())

    def _report_hang(self, call: str, seconds: float) -> None:
        problem = f"the {self.engine} engine made no progress in '{call}' for {seconds:.0f} s (runtime.engine.timeout)"
        remedy = (
            "If it was only slow, raise runtime.engine.timeout or lower runtime.engine.batch_size; if it hangs there "
            "again, set runtime.engine.name to another engine. The stacks of all threads stand below."
        )
        outcome = "Nothing was ended" if self.on_hang is None else "Its process ends; run again to resume the stage"
        message = f"{problem}. {outcome}: a call that hangs in native code cannot be interrupted. {remedy}"
        stream = _stream()
        stream.write(f"{message}\n")
        stream.flush()
        with contextlib.suppress(OSError, RuntimeError):  # the message matters more
            faulthandler.dump_traceback(file=stream, all_threads=True)
        if self.on_hang is not None:
            self.on_hang(message.replace("stand below", "are in the log"))


def _stream() -> io.TextIOBase:
    """Return standard error, or the process's original one if it has no file behind it, as in a notebook."""
    try:
        sys.stderr.fileno()
        return sys.stderr  # type: ignore[return-value]
    except (AttributeError, OSError, ValueError):
        return sys.__stderr__  # type: ignore[return-value]
