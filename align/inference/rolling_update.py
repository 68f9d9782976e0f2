"""New weights for servers while episodes are played: each reads them when the turns that it has have ended.

So every turn has the weights of one version. A server gets no turn from the offer of new weights until it holds them;
servers do not wait for each other. Leaves out writing weights and changes of them between sessions (``pool.py``).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait

from align.inference.dispatch import Dispatcher
from align.inference.pool import PoolEngine
from align.inference.pool_member import FAULTS, Member
from align.inference.server_client import WeightsChanged


class RollingUpdate:
    """Takes the weights that a pool was offered to its servers, one by one. Use it from the session's thread."""

    def __init__(self, pool: PoolEngine, dispatcher: Dispatcher) -> None:
        self.pool, self.dispatcher = pool, dispatcher
        self._loads: dict[Member, Future[None]] = {}
        """Servers that read weights, or have done so since the last look."""
        self._threads: ThreadPoolExecutor | None = None

    def advance(self) -> None:
        """Go over to the newest weights, and have servers without a turn read them in the background.

        Every turn that came back must have been checked before (``PoolEngine.check_weights``): reading replaces what it
        was sampled from. A server that cannot read them is lost. Raises ``WeightsChanged`` where one held others.
        """
        self._take_results()
        self.pool.take_offer()
        for state in self.dispatcher.servers:
            member = state.member
            is_outdated = member.ready and member.version != self.pool.version
            if is_outdated and not state.in_flight and member not in self._loads:
                self._begin(member)

    def wait(self) -> None:
        """Wait until no server reads weights, and lose those that could not."""
        wait(self._loads.values())
        if self._threads is not None:
            self._threads.shutdown()
        # Nothing is sampled any more, so a server that held others' weights spoils nothing.
        self._take_results(is_over=True)

    def _take_results(self, is_over: bool = False) -> None:
        for member in [member for member, load in self._loads.items() if load.done()]:
            # Until now nobody compared what it holds: a load that failed halfway would look like weights of others.
            member.is_loading = False
            try:
                self._loads.pop(member).result()
            except WeightsChanged as error:
                # A server that was restarted has spoiled no turn: those that it had were checked.
                if not (error.restarted or is_over):
                    raise
                self.dispatcher.lose(member, error)
            except FAULTS as error:
                self.dispatcher.lose(member, error)

    def _begin(self, member: Member) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(len(self.pool.members), thread_name_prefix="vllm-rolling-update")
        version = self.pool.version
        member.is_loading = True

        def load() -> None:
            try:
                # This is the last chance to compare the old weights: reading replaces them.
                member.engine.check_weights(content=True)
                member.read(version)
            finally:
                # The session may be waiting for replies, with turns that this server can take now.
                self.dispatcher.wake()

        self._loads[member] = self._threads.submit(load)
