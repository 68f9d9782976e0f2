"""The one place that speaks to Ray: connecting, starting tasks, how they are, what nodes have. Never imports torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from align.config.scheduler import RayConfig
from align.errors import UserError

GIB = 2**30


def require_ray() -> Any:
    """The package ray; ``UserError`` where it is not installed."""
    try:
        import ray
    except ImportError:
        raise UserError("--on ray: ray is not installed here: pip install 'align[ray]'.") from None
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package ray, connected to a cluster; ends what was started through it. ``UserError`` where none answers."""
    ray = require_ray()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"--on ray: no Ray cluster answers at '{address}' ({type(error).__name__}: {first}). Start one with `ray "
            "start --head`, or name a running one as runtime.ray.address; all machines need the same Python and ray."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def wanted(block: RayConfig) -> dict[str, float]:
    """What a task asks of a node, by Ray's names."""
    found = {"CPU": block.cpus, "GPU": block.gpus, **block.resources}
    if block.memory_gb is not None:
        found["memory"] = block.memory_gb * GIB
    return {name: amount for name, amount in found.items() if amount}


def start(ray: Any, work: Callable[..., Any], block: RayConfig, name: str, words: Sequence[Any]) -> Any:
    """Start a task; references among ``words`` are waited for, and their values handed over."""
    options: dict[str, Any] = {
        "num_cpus": block.cpus,
        "num_gpus": block.gpus,
        "resources": dict(block.resources),
        "max_retries": block.retries,
        "name": name,
    }
    if block.memory_gb is not None:
        options["memory"] = int(block.memory_gb * GIB)
    return ray.remote(work).options(**options).remote(*words)


def could_hold(ray: Any, block: RayConfig) -> bool:
    """Whether a node that lives could ever hold the task, when it is free."""
    return could_ever_hold(ray, wanted(block))


def could_ever_hold(ray: Any, needs: dict[str, float]) -> bool:
    """Whether a node that lives has as much of everything, free or not."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(has.get(name, 0.0) >= amount for name, amount in needs.items()) for has in nodes)


def outcome(ray: Any, reference: Any) -> tuple[bool, Any, str]:
    """Whether a task is over, what it returned, and why it returned nothing."""
    done, _ = ray.wait([reference], timeout=0)
    if not done:
        return False, None, ""
    try:
        return True, ray.get(reference), ""
    except ray.exceptions.TaskCancelledError:
        return True, None, "it was cancelled"
    except ray.exceptions.RayTaskError as error:
        return True, None, f"its task failed: {str(error).strip().splitlines()[-1]}"
    except ray.exceptions.RayError as error:
        kind = type(error).__name__
        return True, None, f"its worker or its node died ({kind}), as often as it may be tried again"


def own_node() -> str:
    """Ray's name of the node that this task runs on; empty outside a task."""
    ray: Any = sys.modules.get("ray")  # a task has it
    return str(ray.get_runtime_context().get_node_id()) if ray is not None and ray.is_initialized() else ""


def lives(ray: Any, node: str) -> bool:
    """Whether Ray still counts on a node; on one without a name it does."""
    return not node or any(one["NodeID"] == node and one["Alive"] for one in ray.nodes())


def call_off(ray: Any, references: Sequence[Any]) -> None:
    """Interrupt tasks, as Ctrl-C would, and give them a moment to end their stages."""
    for reference in references:
        with contextlib.suppress(Exception):
            ray.cancel(reference, force=False)
    with contextlib.suppress(Exception):
        ray.wait(list(references), num_returns=len(references), timeout=15)
