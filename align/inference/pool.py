"""Rollouts by several vLLM servers that hold the same weights: started or met together, lost and taken back singly.

What is asked of a server stands in ``server.py``, which server is asked in ``dispatch.py``. A server that is lost is
started anew, or asked again once it answers, beside the others' work; it samples no more until it holds the weights
that they hold. Left out: servers on machines that this one cannot start processes on, other than by their addresses.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from align.errors import UserError
from align.inference.dispatch import Dispatch, Question
from align.inference.protocol import Progress, Response, RolloutEngine, Sampling
from align.inference.server import COMPLETIONS, ServerEngine
from align.inference.server_client import POLL_SECONDS, BadReply, Client, EngineLost, WeightsChanged
from align.inference.server_options import Served
from align.inference.server_process import GRACE_SECONDS
from align.inference.watchdog import Watchdog
from align.inference.weights import checkpoint_weights, with_tied_head
from align.inference.weights_folder import WeightsFolder

Found = TypeVar("Found")

FAULTS = (EngineLost, BadReply, OSError)
"""What a server may do that another, or the same one started anew, may not."""


class Member:
    """One server of the pool, and how it is with it."""

    def __init__(self, number: int) -> None:
        self.number, self.losses, self.trouble = number, 0, ""
        self.engine: ServerEngine
        self.held = 0
        """Version of the weights that it holds; 0 are those of the checkpoint."""
        self.ready = False
        self.coming_back = False

    @property
    def client(self) -> Client:
        """Where it is asked."""
        return self.engine.client


class PoolEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around vLLM servers."""

    name = ServerEngine.name

    def __init__(self, served: Served, warn: Callable[[str], None] = print, watchdog: Watchdog | None = None) -> None:
        """Start the servers that ``served.pool`` asks for, all at once, or meet those that it names and give them the
        checkpoint's weights.

        Raises ``UserError`` when one is unfit, ``EngineLost`` when one does not start or answer. ``warn`` hears of
        servers that are lost later on.
        """
        self.served, self.warn, self.watchdog = served, warn, watchdog
        self.dtype, self.batch_size = served.dtype, served.config.batch_size
        self.folder = WeightsFolder(served)
        self.members = [Member(number) for number in range(served.pool.servers or len(served.pool.addresses))]
        self.version = 0
        """Of the weights that are sampled from; 0 are those of the checkpoint."""
        self.returns = 0
        """Times that a server came back."""
        self.closing = threading.Event()
        self._changed = threading.Condition()
        self._weights = threading.RLock()
        """Held while weights are written or read, so that a server that comes back never reads half a change."""
        self._returning: list[threading.Thread] = []
        try:
            self._open_all()
            if served.pool.addresses:
                self._give(checkpoint_weights(served.model_dir), first=True)
        except BaseException:
            self.close()
            raise

    def _open_all(self) -> None:
        errors: list[Exception] = []

        def first(member: Member) -> None:
            try:
                self._open(member)
                member.ready = True
            except Exception as error:
                errors.append(error)
                self.closing.set()  # nobody waits for the others

        self._each(self.members, first)
        if errors:
            raise errors[0]

    def _open(self, member: Member) -> None:
        member.engine = ServerEngine(self.served, self.folder, member.number, self.closing)

    def _each(self, members: list[Member], do: Callable[[Member], None]) -> None:
        """Do something with several servers at once; the first error is raised when all are through."""
        with ThreadPoolExecutor(max(1, len(members)), thread_name_prefix="vllm-pool") as threads:
            done = [threads.submit(do, member) for member in members]
        for one in done:
            one.result()

    # ---- asking ----

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """See the protocol. Which server answers what makes no difference: every response has its own seed."""
        engine = self.members[0].engine
        bodies = engine.questions(prompts, sampling)
        questions = [
            Question(body, lambda member, body, answer: member.engine.sampled(body, answer), place // sampling.n)
            for place, body in enumerate(bodies)
        ]
        return engine.responses(self._ask(questions, on_progress), sampling.n)

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """See the protocol. ``temperature`` must be 1, as for one server."""
        bodies = self.members[0].engine.scoring(prompts, responses, temperature)

        def reader(start: int) -> Callable[[Any, dict[str, Any], Any], list[float]]:
            return lambda member, body, answer: member.engine.scored(body, answer, start)

        return self._ask(
            [Question(body, reader(len(prompts[place])), place) for place, body in enumerate(bodies)], None
        )

    def _ask(self, questions: list[Question], on_progress: Progress | None) -> list[Any]:
        self._check_weights()
        self.await_ready()
        answers = Dispatch(self, COMPLETIONS, questions, self.batch_size, on_progress).run()
        self._check_weights(sampled=True)
        return answers

    def ask_each(self, do: Callable[[RolloutEngine], Found]) -> list[Found]:
        """Do something with every server that is ready; one that fails is lost. Raises as ``await_ready``."""
        self._check_weights()
        found = []
        for member in [member for member in self.members if member.ready]:
            try:
                found.append(do(member.engine))
            except FAULTS as error:
                self.lose(member, error)
        self._check_weights(sampled=True)
        self.await_ready()
        return found

    # ---- weights ----

    def _check_weights(self, *, sampled: bool = False, content: bool = False) -> None:
        """Raise ``WeightsChanged`` where a server holds other weights than it was given; ``content`` as for a server.

        Where nothing was ``sampled`` since the last check, a server that was started anew meanwhile is lost, and comes
        back with weights.
        """

        def check(member: Member) -> None:
            try:
                member.engine.check_weights(content)
            except WeightsChanged as error:
                if sampled or not error.restarted:
                    raise
                self.lose(member, error)
            except FAULTS as error:
                self.lose(member, error)

        self._each([member for member in self.members if member.ready], check)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See the protocol: no server samples again before it holds them.

        Raises ``EngineLost`` when no server is left that can take them, ``BadReply`` when none can read the folder.
        """
        self._check_weights(content=True)
        self.await_ready()
        self._give(weights)

    @property
    def takes_folders(self) -> bool:
        """Whether weights can be written now, and read by the servers later."""
        return self.served.pool.weights == "folder"

    def write_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Write a full set for ``adopt``, which is given what this returns; servers go on with what they hold."""
        return self.folder.write(weights)

    def adopt(self, version: int) -> None:
        """Have every server read what was written: the second half of ``load_weights``. Raises as it does."""
        self._check_weights(content=True)
        self.await_ready()
        self._give(version)

    def _give(self, weights: Iterable[tuple[str, torch.Tensor]] | int, first: bool = False) -> None:
        """Give weights, or the version of some that were written. ``first``: a server that fails is no loss to be
        borne, but the error of whoever opened the pool."""
        failed: dict[Member, Exception] = {}

        def read(member: Member) -> None:
            try:
                member.engine.read_weights(self.version)
                member.held = self.version
            except FAULTS as error:
                failed[member] = error

        with self._weights:
            ready = [member for member in self.members if member.ready]
            if not isinstance(weights, int) and not self.takes_folders:
                self._send(list(with_tied_head(weights, self.served.tied)), ready, failed)
            else:
                self.version = weights if isinstance(weights, int) else self.folder.write(weights)
                self._each(ready, read)
            if failed and (first or all(isinstance(failed.get(member), BadReply) for member in ready)):
                raise next(iter(failed.values()))
            for member, error in failed.items():
                self.lose(member, error)
            self.folder.drop_before(self.version)
        self.await_ready()

    def _send(
        self, weights: list[tuple[str, torch.Tensor]], ready: list[Member], failed: dict[Member, Exception]
    ) -> None:
        """Over NCCL, from this thread, one server after another: each has a group of its own with the trainer."""
        self.version += 1
        back = [member for member in self.members if member.held < 0]
        for member in [*ready, *back]:
            try:
                member.engine.send_weights(weights, self.watchdog)
                member.held, member.ready = self.version, True
            except FAULTS as error:
                failed[member] = error

    # ---- servers that are lost, and come back ----

    def lose(self, member: Member, error: Exception) -> None:
        """Ask a server no more until it has come back, which it may ``restarts`` times."""
        with self._changed:
            member.ready, member.trouble = False, str(error)
            member.losses += 1
            returns = member.losses <= self.served.pool.restarts and not self.closing.is_set()
            member.coming_back = returns
            self._changed.notify_all()
        self._say_lost(member, error)
        if returns:
            back = threading.Thread(target=self._bring_back, args=(member,), name="vllm-pool-return", daemon=True)
            self._returning.append(back)
            back.start()
        else:
            member.engine.end()

    def _say_lost(self, member: Member, error: Exception) -> None:
        if self.closing.is_set():
            return
        then = "it is given up"
        if member.coming_back:
            then = "it is asked again until it answers" if self.served.pool.addresses else "it is started anew"
        who = f"Server {member.number + 1} of {len(self.members)} is lost, for the {_times(member.losses)} time"
        self.warn(f"{error}\n{who}: {then}.")

    def _bring_back(self, member: Member) -> None:
        """In a thread of its own: start or meet the server again, and give it the weights of the others."""
        while not self.closing.is_set():
            try:
                self._reopen(member)
                with self._weights:
                    if self.served.pool.weights == "nccl":
                        member.held = -1  # the trainer's thread gives it the next ones, and only then is it ready
                    else:
                        if self.version or not member.engine.own:
                            member.engine.read_weights(self.version)
                        member.held = self.version
                    with self._changed:
                        member.ready, member.coming_back = member.held == self.version, False
                        self.returns += 1
                        self._changed.notify_all()
                    return
            except (*FAULTS, UserError) as error:
                with self._changed:
                    member.trouble = str(error)
                    member.losses += 1
                    unfit = isinstance(error, UserError)  # it was waited for as long as may be
                    member.coming_back = member.losses <= self.served.pool.restarts and not unfit
                    self._changed.notify_all()
                if not member.coming_back:
                    self._say_lost(member, error)
                    return

    def _reopen(self, member: Member) -> None:
        """Raises what came of the last try when there is no server after ``runtime.engine.timeout`` seconds."""
        member.engine.end()
        deadline = time.monotonic() + self.served.config.timeout
        while True:
            try:
                self._open(member)
                return
            except UserError:  # a server of somebody else's that does not answer yet
                if self.served.pool.servers or time.monotonic() > deadline or self.closing.wait(POLL_SECONDS):
                    raise

    def await_ready(self) -> None:
        """Wait until a server is ready. Raises ``EngineLost`` when none is, and none is coming back."""
        with self._changed:
            while not any(member.ready for member in self.members):
                if not any(member.coming_back for member in self.members):
                    raise EngineLost(self._why_none())
                self._changed.wait(POLL_SECONDS)

    def _why_none(self) -> str:
        troubles = list(dict.fromkeys(member.trouble for member in self.members))
        said = "\n".join(troubles)
        if any(member.held < 0 for member in self.members):
            return f"{said}\nServers that came back wait for weights, which the trainer sends with the next update."
        if self.served.pool.restarts == 0 and len(self.members) == 1:
            return said
        return (
            f"{said}\nNo server is left of {len(self.members)}: each was lost more than "
            f"{self.served.pool.restarts} times (runtime.rollouts.restarts), or did not come back as it was."
        )

    def close(self) -> None:
        """See the protocol. Servers that were running already go on, with the last weights they were given."""
        self.closing.set()
        for back in self._returning:
            back.join(GRACE_SECONDS)  # it ends what it started; a server that it leaves behind ends with this process
        opened = [member for member in self.members if hasattr(member, "engine")]
        self._each(opened, lambda member: member.engine.end())
        self.folder.close()


def _times(count: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(count, f"{count}th")
