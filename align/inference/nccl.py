"""Weight transfer to a vLLM server on other GPUs, from GPU to GPU over NCCL.

Uses vLLM's own weight transfer: the public names of ``vllm.distributed.weight_transfer`` and the routes of its
development mode, as of 0.31. Both sides first form a process group at a port that is opened here. Each update is then
started, announced (names, types, shapes), broadcast and finished. The client bounds the control calls. A broadcast
whose other side is gone hangs in native code, so a watchdog covers all of it. Leaves out a server on the trainer's GPU
(NCCL wants one GPU per rank), several training processes, and updates that hold only what changed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from align.errors import UserError
from align.inference.server_client import UNIX, Client
from align.inference.server_process import free_port
from align.inference.watchdog import Watchdog
from align.inference.weights import refuse_missing

INIT, WORKERS = "/init_weight_transfer_engine", "/get_world_size"
START, UPDATE, FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"
SERVER_OPTIONS = ["--weight-transfer-config", '{"backend": "nccl"}']


def is_offered(config: dict[str, Any]) -> bool:
    """Return True for the configuration (``vllm_config`` of ``/server_info``) of a server with these options."""
    transfer = config.get("weight_transfer_config") if isinstance(config, dict) else None
    return isinstance(transfer, dict) and transfer.get("backend") == "nccl"


class Control:
    """Control calls of vLLM's sender to the server (its ``VLLMWeightSyncClient``), each bounded in time."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the server's workers join the process group; return when they have."""
        self.client.call(INIT, {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Announce an update."""
        self.client.call(START)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Announce names, types and shapes; return when the tensors have been received."""
        self.client.call(UPDATE, {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update."""
        self.client.call(FINISH)


class TensorSource:
    """Tensors for vLLM's sender (its ``WeightSource``): first their metadata, then themselves, in the same order."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, torch.Tensor]] = []

    def metadata(self) -> list[Any]:
        """Return name, type and shape of each tensor."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.pairs)


class NcclSender:
    """Sends full sets of weights to one server, from this process's GPU."""

    def __init__(self, client: Client, device: torch.device, dtype: torch.dtype, watchdog: Watchdog) -> None:
        """Form a process group with the server's workers.

        Raises ``UserError`` where vLLM is missing, or too old, on this side.
        """
        self.device, self.dtype, self.watchdog = device, dtype, watchdog
        self.source = TensorSource()
        try:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise UserError(
                f"runtime.rollouts.weights is nccl, but vLLM's sender does not import here ({error}). Install vLLM "
                "0.31 on the trainer's side too, or take `weights: folder`."
            ) from None
        # A tensor-parallel server has several workers. Each is a rank of the group; the trainer is rank 0.
        workers = client.find(WORKERS, client.call(WORKERS, method="GET"), "world_size")
        if not isinstance(workers, int) or workers < 1:
            raise client.unexpected(WORKERS, "world_size is no number of workers", workers)
        address, port = rendezvous(client)
        group = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + workers)
        with self.watchdog.watch("meeting over NCCL"):
            # The server joins during a call from another thread. If it never does, the watchdog says so.
            source: Any = self.source
            self.sender = WeightTransferTrainerFactory.trainer_init(group, client=Control(client), source=source)

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], names: set[str]) -> None:
        """Send a full set of weights; the GPU holds a copy in the engine's type meanwhile.

        Each tensor has the shape that the checkpoint gives its name.
        Raises ``ValueError`` before anything is sent when a tensor of ``names`` is missing.
        """
        with self.watchdog.watch("load_weights"):
            try:
                for name, tensor in weights:
                    # Metadata is sent before the first tensor, so all of them are converted and held first.
                    dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
                    self.source.pairs.append((name, tensor.detach().to(self.device, dtype).contiguous()))
                    self.watchdog.progress()
                refuse_missing(names, {name for name, _ in self.source.pairs})
                self.sender.send_weights()
            finally:
                # The copies took as much of the GPU as the model.
                self.source.pairs.clear()


def rendezvous(client: Client) -> tuple[str, int]:
    """Return this machine's address as the server sees it, and a port that is free there."""
    if client.address.startswith(UNIX):
        return "127.0.0.1", free_port()
    with socket.create_connection((client.host, client.port), client.timeout) as connection:
        address = str(connection.getsockname()[0])
    return address, free_port(address)
