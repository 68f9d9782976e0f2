"""New weights for a vLLM server on other GPUs, from GPU to GPU over NCCL.

vLLM's own weight transfer does it, through the public names of ``vllm.distributed.weight_transfer`` and the routes of
its development mode, as of 0.31: the server is told to receive, both sides meet at a port that is opened here, and each
update is started, announced (names, types, shapes), broadcast, and finished. The control calls are bounded by our
client; a broadcast whose other side is gone hangs in native code, so all of it is watched. Left out: a server on the
trainer's own GPU (NCCL wants one GPU for each rank), several training processes, updates that hold only what changed.
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
    """Whether a server of this configuration (``vllm_config`` of ``/server_info``) was started with these options."""
    transfer = config.get("weight_transfer_config") if isinstance(config, dict) else None
    return isinstance(transfer, dict) and transfer.get("backend") == "nccl"


class Control:
    """The calls that vLLM's sender makes to the server (its ``VLLMWeightSyncClient``), each of which ends in time."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the server's workers join; returns when they have."""
        self.client.call(INIT, {"init_info": init_info})

    def start_weight_update(self) -> None:
        """From now on weights come."""
        self.client.call(START)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Announce what comes; returns when it has been received."""
        self.client.call(UPDATE, {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All weights have come."""
        self.client.call(FINISH)


class Weights:
    """What vLLM's sender reads (its ``WeightSource``): what comes, then the tensors themselves, in the same order."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, torch.Tensor]] = []

    def metadata(self) -> list[Any]:
        """Name, type and shape of each tensor."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.pairs)


class NcclSender:
    """Sends full sets of weights to one server, from this process's GPU."""

    def __init__(self, client: Client, device: torch.device, dtype: torch.dtype, watchdog: Watchdog) -> None:
        """Meet the server's workers. Raises ``UserError`` where vLLM is missing, or too old, on this side."""
        self.device, self.dtype, self.watchdog, self.source = device, dtype, watchdog, Weights()
        try:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise UserError(
                f"runtime.rollouts.weights is nccl, but vLLM's sender does not import here ({error}). Install vLLM "
                "0.31 on the trainer's side too, or take `weights: folder`."
            ) from None
        workers = client.find(WORKERS, client.call(WORKERS, method="GET"), "world_size")
        if not isinstance(workers, int) or workers < 1:
            raise client.unexpected(WORKERS, "world_size is no number of workers", workers)
        address, port = meeting_point(client)
        met = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + workers)
        with self.watchdog.watch("meeting over NCCL"):
            source: Any = self.source
            self.sender = WeightTransferTrainerFactory.trainer_init(met, client=Control(client), source=source)

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], names: set[str]) -> None:
        """Send a full set, of which a copy in the engine's type lies on the GPU meanwhile.

        Raises ``ValueError`` before anything is sent when one of ``names`` is not among them.
        """
        with self.watchdog.watch("load_weights"):
            try:
                for name, tensor in weights:
                    dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
                    self.source.pairs.append((name, tensor.detach().to(self.device, dtype).contiguous()))
                    self.watchdog.progress()
                refuse_missing(names, {name for name, _ in self.source.pairs})
                self.sender.send_weights()
            finally:
                self.source.pairs.clear()


def meeting_point(client: Client) -> tuple[str, int]:
    """This machine's address as the server sees it, and a port that is free there."""
    if client.address.startswith(UNIX):
        return "127.0.0.1", free_port()
    with socket.create_connection((client.host, client.port), client.timeout) as towards:
        address = str(towards.getsockname()[0])
    return address, free_port(address)
