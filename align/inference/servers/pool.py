"""Rollouts by several vLLM servers that hold the same weights: opened together, lost and added back one by one.

``server.py`` has the requests of one server, ``dispatch.py`` the choice among servers. A lost server is restarted, or
called until it answers again, while the others work. It samples no more until it holds the weights that they hold.
Leaves out starting servers on other machines; those are used by their addresses.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from align.errors import UserError
from align.inference.protocol import Progress, Response, RolloutEngine, Sampling, Session, Watchdog, check_idle
from align.inference.servers.dispatch import Dispatcher, ServerRequest
from align.inference.servers.server import COMPLETIONS, FAULTS, NO_WEIGHTS, Member, ServerEngine
from align.inference.servers.server_client import POLL_SECONDS, BadReply, EngineLost, WeightsChanged
from align.inference.servers.server_options import ServerSpec
from align.inference.servers.server_process import GRACE_SECONDS
from align.inference.weights import Weights, WeightsFolder, checkpoint_weights, with_stored_names, with_tied_head

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class PoolEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around vLLM servers."""

    name = ServerEngine.name

    def __init__(
        self,
        spec: ServerSpec,
        warn: Callable[[str], None] = logger.warning,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Start the servers that ``spec.pool`` asks for, all at once, or connect to those that it names.

        Named servers are given the checkpoint's weights. Raises ``UserError`` when one is unfit and ``EngineLost`` when
        one does not start or answer. Servers that are lost later on are reported to ``warn``.
        """
        self.spec = spec
        self.warn = warn
        self.watchdog = watchdog
        self.dtype = spec.dtype
        self.batch_size = spec.config.batch_size
        self.folder = WeightsFolder(spec)
        self.members = [Member(number) for number in range(spec.pool.servers or len(spec.pool.addresses))]
        self.version = 0
        """Version of the weights that are sampled from; 0 stands for the checkpoint's weights."""
        self.offered = 0
        """Newest version that a session may go over to."""
        self.weights_updates: dict[int, int] = {}
        """Version that was offered → update before which the policy had these weights."""
        self.session: Session | None = None
        """The session that is open."""
        self.returns = 0
        """Times that a server came back."""
        self.closing = threading.Event()
        self._changed = threading.Condition()
        self._weights_lock = threading.RLock()
        """Held while weights are written or read, so a server that comes back never reads half a change."""
        self._return_threads: list[threading.Thread] = []
        try:
            self._open_all()
            # Named servers hold whatever they were given last, maybe by another run.
            if spec.pool.addresses:
                self._give(checkpoint_weights(spec.model_dir), first=True)
        except BaseException:
            self.close()
            raise

    def _open_all(self) -> None:
        errors: list[Exception] = []

        def open_first_time(member: Member) -> None:
            try:
                self._open(member)
                member.ready = True
            except Exception as error:
                errors.append(error)
                self.closing.set()  # the starts of the others are cancelled

        self._for_each(self.members, open_first_time)
        if errors:
            raise errors[0]

    def _open(self, member: Member) -> None:
        member.engine = ServerEngine(self.spec, self.folder, member.number, self.closing)

    def _for_each(self, members: list[Member], action: Callable[[Member], None]) -> None:
        """Run ``action`` for several servers at once. The first error is raised when all have finished."""
        with ThreadPoolExecutor(max(1, len(members)), thread_name_prefix="vllm-pool") as threads:
            futures = [threads.submit(action, member) for member in members]
        for future in futures:
            future.result()

    def _ready_members(self) -> list[Member]:
        return [member for member in self.members if member.ready]

    def takes_requests(self, member: Member) -> bool:
        """Return True while a server holds the weights to sample from; during a session it may still have others."""
        return member.ready and member.version == self.version

    # ---- sampling ----

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Return sampled responses. The choice of server changes none of them: every response has its own seed."""

        def parse(member: Member, body: dict[str, Any], answer: Any) -> tuple[list[int], list[float]]:
            return member.engine.parse_sample(body, answer)

        engine = self.members[0].engine
        bodies = engine.sampling_requests(prompts, sampling)
        requests = [ServerRequest(body, parse, group=index // sampling.n) for index, body in enumerate(bodies)]
        return engine.build_responses(self._dispatch(requests, on_progress), sampling.n)

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Return log-probabilities of response tokens. ``temperature`` must be 1, as for one server."""

        def parser(start: int) -> Callable[[Member, dict[str, Any], Any], list[float]]:
            return lambda member, body, answer: member.engine.parse_scores(body, answer, start)

        bodies = self.members[0].engine.scoring_requests(prompts, responses, temperature)
        requests = [ServerRequest(body, parser(len(prompts[index])), group=index) for index, body in enumerate(bodies)]
        return self._dispatch(requests, None)

    def _dispatch(self, requests: list[ServerRequest], on_progress: Progress | None) -> list[Any]:
        """Return the results of requests, with the servers' weights compared before and after."""
        check_idle(self.session, "generate")
        self.check_weights()
        self.await_ready()
        results = Dispatcher(self, COMPLETIONS, requests, self.batch_size, on_progress).run()
        self.check_weights(sampled=True)
        return results

    def ask_each(self, action: Callable[[RolloutEngine], Result]) -> list[Result]:
        """Return the results of ``action`` for every ready server; a server that fails is lost.

        Raises ``EngineLost``.
        """
        check_idle(self.session, "ask_each")
        self.check_weights()
        results = []
        for member in self._ready_members():
            try:
                results.append(action(member.engine))
            except FAULTS as error:
                self.lose(member, error)
        self.check_weights(sampled=True)
        self.await_ready()
        return results

    # ---- weights ----

    def check_weights(
        self, *, sampled: bool = False, content: bool = False, lose: Callable[[Member, Exception], None] | None = None
    ) -> None:
        """Raise ``WeightsChanged`` if a server holds other weights than it was given; skip those that read new ones.

        ``content`` compares tensors as well. If no response was ``sampled`` since the last check, none is wrong: a
        server that was restarted meanwhile is only lost, and comes back with weights. ``lose`` is called for servers
        that are lost, in a thread for each, instead of the pool's own method.
        """
        lose = lose or self.lose

        def check(member: Member) -> None:
            try:
                member.engine.check_weights(content)
            except WeightsChanged as error:
                if sampled or not error.restarted:
                    raise
                lose(member, error)
            except FAULTS as error:
                lose(member, error)

        self._for_each([member for member in self._ready_members() if not member.is_loading], check)

    def load_weights(self, weights: Weights) -> None:
        """Give every server a full set of weights; none samples again before it holds them.

        Each tensor has the shape that the checkpoint gives its name.
        Raises ``EngineLost`` when no server is left that can read them, ``BadReply`` when none can read the folder.
        """
        self.check_weights(content=True)
        self.await_ready()
        self._give(weights)

    @property
    def takes_folders(self) -> bool:
        """True when weights can be written now, and read by the servers later."""
        return self.spec.pool.weights == "folder"

    def write_weights(self, weights: Weights) -> int:
        """Write a full set, in the checkpoint's shapes, and return its version for ``adopt``.

        Servers continue with what they hold.
        """
        return self.folder.write(weights)

    def offer(self, version: int, update: int) -> None:
        """Let a session go over to a version that was written, between two turns (``sessions.RollingUpdate``).

        ``update`` is the one before which the policy has these weights. Call ``adopt`` behind the session.
        """
        self.weights_updates[version] = update
        self.offered = version

    def take_offer(self) -> None:
        """Sample from the newest version that was offered, if it is newer. Servers with others get no requests."""
        # While a server that comes back reads a version, the offer can wait.
        if self.offered > self.version and self._weights_lock.acquire(blocking=False):
            self.version = self.offered
            self._weights_lock.release()

    def adopt(self, version: int) -> None:
        """Have every server read a version that was written: the second half of ``load_weights``. Raises as it does.

        Servers that hold it, or a newer version that was offered, keep what they have.
        """
        self.check_weights(content=True)
        self.await_ready()
        self._give(version)

    def _give(self, weights: Weights | int, first: bool = False) -> None:
        """Give ready servers weights, or a version that was written.

        A server that fails is lost, but with ``first`` its error is raised: whoever opens the pool must know.
        """
        failed: dict[Member, Exception] = {}

        def read(member: Member) -> None:
            try:
                member.read(self.version)
            except FAULTS as error:
                failed[member] = error

        check_idle(self.session, "load_weights")
        with self._weights_lock:
            ready = self._ready_members()
            # 1. Hand the weights over: through the folder, which all read at once, or over NCCL, one after another.
            if isinstance(weights, int):
                self.version = max(self.version, weights)
                self._for_each([member for member in ready if member.version != self.version], read)
            elif self.takes_folders:
                self.version = self.folder.write(weights)
                self._for_each(ready, read)
            else:
                stored = with_stored_names(weights, self.spec.model_dir, self.spec.tensor_names)
                self._send(list(with_tied_head(stored, self.spec.tied_embeddings)), ready, failed)
            # 2. When no server can read the folder, the folder is at fault, not the servers.
            if failed and (first or all(isinstance(failed.get(member), BadReply) for member in ready)):
                raise next(iter(failed.values()))
            # 3. Servers without the new weights sample no more. They read this version when they come back, so only
            #    older ones are removed.
            for member, error in failed.items():
                self.lose(member, error)
            self.folder.drop_before(self.version)
        self.await_ready()

    def _send(
        self, weights: list[tuple[str, torch.Tensor]], ready: list[Member], failed: dict[Member, Exception]
    ) -> None:
        """Send weights over NCCL from this thread, server by server: each has its own group with the trainer.

        Servers that came back get their first weights here.
        """
        self.version += 1
        returned = [member for member in self.members if member.version == NO_WEIGHTS]
        for member in [*ready, *returned]:
            try:
                member.engine.send_weights(weights, self.watchdog)
                member.version = self.version
                member.ready = True
            except FAULTS as error:
                failed[member] = error

    # ---- servers that are lost, and come back ----

    def lose(self, member: Member, error: Exception) -> None:
        """Stop using a server until it has come back, which it may ``restarts`` times."""
        with self._changed:
            member.ready = False
            returns = self._note_failure(member, error) and not self.closing.is_set()
            member.coming_back = returns
            self._changed.notify_all()
        self._warn_lost(member, error)
        if returns:
            # A restart needs minutes. The other servers sample on meanwhile.
            thread = threading.Thread(target=self._take_back, args=(member,), name="vllm-pool-return", daemon=True)
            self._return_threads.append(thread)
            thread.start()
        else:
            member.engine.end()

    def _note_failure(self, member: Member, error: Exception) -> bool:
        """Count a failure; return True while the server may come back."""
        member.last_error = str(error)
        member.losses += 1
        return member.losses <= self.spec.pool.restarts

    def _warn_lost(self, member: Member, error: Exception) -> None:
        if self.closing.is_set():
            return
        outcome = "it is given up"
        if member.coming_back:
            outcome = "it is asked again until it answers" if self.spec.pool.addresses else "it is restarted"
        name = f"Server {member.number + 1} of {len(self.members)}"
        self.warn(f"{error}\n{name} is lost, for the {_ordinal(member.losses)} time: {outcome}.")

    def _take_back(self, member: Member) -> None:
        """Open a lost server again and give it the others' weights. Runs in its own thread until that worked."""
        while not self.closing.is_set():
            try:
                self._reopen(member)
                # No change of weights may begin between the server's reading of a version and its becoming ready.
                with self._weights_lock:
                    self._restore_weights(member)
                    with self._changed:
                        member.ready = member.version == self.version
                        member.coming_back = False
                        # When this number grows, the trainer probes parity again.
                        self.returns += 1
                        self._changed.notify_all()
                return
            except (*FAULTS, UserError) as error:
                with self._changed:
                    may_return = self._note_failure(member, error)
                    # UserError: the server is unfit, or was waited for as long as may be.
                    member.coming_back = may_return and not isinstance(error, UserError)
                    self._changed.notify_all()
                if not member.coming_back:
                    self._warn_lost(member, error)
                    return

    def _restore_weights(self, member: Member) -> None:
        """Have a server that came back read the current version. Over NCCL only the trainer's thread can send it."""
        if self.spec.pool.weights == "nccl":
            member.version = NO_WEIGHTS
            return
        if self.version or not member.engine.is_local:  # a local server starts with version 0, the checkpoint's
            member.engine.read_weights(self.version)
        member.version = self.version

    def _reopen(self, member: Member) -> None:
        """Start or connect to a server again, for up to ``runtime.engine.timeout`` seconds; raises the last error."""
        # The old process may still hold the GPU.
        member.engine.end()
        deadline = time.monotonic() + self.spec.config.timeout
        while True:
            try:
                self._open(member)
                return
            except UserError:  # a server of somebody else's that does not answer yet
                if self.spec.pool.servers or time.monotonic() > deadline or self.closing.wait(POLL_SECONDS):
                    raise

    def await_ready(self) -> None:
        """Wait until a server is ready. Raises ``EngineLost`` when none is, and none is coming back."""
        with self._changed:
            while not any(member.ready for member in self.members):
                if not any(member.coming_back for member in self.members):
                    raise EngineLost(self._explain_none_left())
                self._changed.wait(POLL_SECONDS)

    def _explain_none_left(self) -> str:
        errors = "\n".join(dict.fromkeys(member.last_error for member in self.members))
        if any(member.version == NO_WEIGHTS for member in self.members):
            return f"{errors}\nServers that came back wait for weights, which the trainer sends with the next update."
        if self.spec.pool.restarts == 0 and len(self.members) == 1:
            return errors
        return (
            f"{errors}\nNo server is left of {len(self.members)}: each was lost more than "
            f"{self.spec.pool.restarts} times (runtime.rollouts.restarts), or did not come back as it was."
        )

    def close(self) -> None:
        """End the servers that were started here. Others continue with the last weights they were given."""
        self.closing.set()
        for thread in self._return_threads:
            # The thread ends the server it has started. A thread that outlasts the wait ends with this process.
            thread.join(GRACE_SECONDS)
        opened = [member for member in self.members if hasattr(member, "engine")]
        self._for_each(opened, lambda member: member.engine.end())
        self.folder.close()


def _ordinal(count: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(count, f"{count}th")
