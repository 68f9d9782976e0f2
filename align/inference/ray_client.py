"""All calls to Ray: connecting, starting tasks, their outcomes, the resources of nodes. Never imports torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.runtime.executor import RayExecutor, SamplersConfig
from align.errors import UserError

GIB = 2**30


def require_ray() -> Any:
    """Return the package ray. Raises ``UserError`` if it is not installed."""
    try:
        import ray
    except ImportError:
        raise UserError("executor ray: ray is not installed here: pip install 'align-pipeline[ray]'.") from None
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster and yield the package ray; on exit everything started through it ends.

    Raises ``UserError`` if no cluster answers.
    """
    ray = require_ray()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"executor ray: no Ray cluster answers at '{address}' ({type(error).__name__}: {first}). Start one with "
            "`ray start --head`, or name a running one as runtime.executor.address; all machines need the same Python "
            "and ray."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def required_resources(block: RayExecutor | SamplersConfig) -> dict[str, float]:
    """Return the resources that a task or an engine needs on a node, by Ray's names."""
    resources = {"CPU": block.cpus, "GPU": block.gpus, **block.resources}
    if isinstance(block, RayExecutor) and block.memory_gb is not None:
        resources["memory"] = block.memory_gb * GIB
    return {name: amount for name, amount in resources.items() if amount}


def describe_resources(block: RayExecutor | SamplersConfig) -> str:
    """Return the resources that a task or an engine needs, as text."""
    return ", ".join(f"{name} {amount:g}" for name, amount in required_resources(block).items())


def start(ray: Any, function: Callable[..., Any], block: RayExecutor, name: str, arguments: Sequence[Any]) -> Any:
    """Start a task and return its reference. References among ``arguments`` are waited for and replaced by values."""
    options: dict[str, Any] = {
        "num_cpus": block.cpus,
        "num_gpus": block.gpus,
        "resources": dict(block.resources),
        "max_retries": block.retries,
        "name": name,
    }
    if block.memory_gb is not None:
        options["memory"] = int(block.memory_gb * GIB)
    return ray.remote(function).options(**options).remote(*arguments)


def could_hold(ray: Any, block: RayExecutor | SamplersConfig) -> bool:
    """Return True when a live node could run the task or engine once it is free."""
    needs = required_resources(block)
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"] and all(resources.get(name, 0.0) >= amount for name, amount in needs.items()):
            return True
    return False


@dataclass(frozen=True)
class Outcome:
    """State of a task and, once it is over, its result."""

    is_over: bool
    result: Any = None
    error: str = ""
    """Reason why a task that is over has no result."""
    is_lost: bool = False
    """True if its worker or its node died as often as it may be tried again."""


def outcome(ray: Any, reference: Any) -> Outcome:
    """Return whether a task is over, with its result or the reason why it has none."""
    ready, _ = ray.wait([reference], timeout=0)
    if not ready:
        return Outcome(is_over=False)
    try:
        return Outcome(is_over=True, result=ray.get(reference))
    except ray.exceptions.TaskCancelledError:
        return Outcome(is_over=True, error="it was cancelled")
    # The text is the task's traceback, whose last line names the error.
    except ray.exceptions.RayTaskError as error:
        return Outcome(is_over=True, error=f"its task failed: {str(error).strip().splitlines()[-1]}")
    except ray.exceptions.RayError as error:
        kind = type(error).__name__
        text = f"its worker or its node died ({kind}), as often as it may be tried again"
        return Outcome(is_over=True, error=text, is_lost=True)


def current_node() -> str:
    """Return Ray's name of the node that this task runs on; empty outside a task."""
    ray: Any = sys.modules.get("ray")  # a task has imported it
    if ray is None or not ray.is_initialized():
        return ""
    return str(ray.get_runtime_context().get_node_id())


def is_alive(ray: Any, node_id: str) -> bool:
    """Return True while Ray counts a node as alive. A node without a name counts as alive."""
    return not node_id or any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def cancel(ray: Any, references: Sequence[Any]) -> None:
    """Interrupt tasks as Ctrl-C would, and give them 15 s to end their stages."""
    # The cluster may be gone. An error about one task must not keep the others from being cancelled.
    for reference in references:
        with contextlib.suppress(Exception):
            ray.cancel(reference, force=False)
    with contextlib.suppress(Exception):
        ray.wait(list(references), num_returns=len(references), timeout=15)
