"""The way of weights over NCCL, without a GPU: ``python -m tests.support.inference.nccl_checks TINY_MODEL``.

Real are both ends as vLLM has them, its sender here and its worker's receiver behind the stand-in server, the calls
between them, and every check they make of each other. NCCL itself is a queue, so packing, streams and the meeting of
the ranks are not covered: they need two GPUs. vLLM changes its process when it is imported, hence a process of its own.
"""

from __future__ import annotations

import functools
import os
import queue
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine

from align.config.tuning import LoraTuning
from align.inference.protocol import Watchdog
from align.inference.servers.server import RESET, ServerEngine
from align.inference.servers.server_client import BadReply, EngineLost
from align.inference.servers.server_options import FINISH, INIT, START, UPDATE, WORKERS
from align.inference.weights import HEAD, WeightsFolder, checkpoint_weights
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning
from align.models.tuning.peft_layers import merged_weights
from tests.support.inference.fake_server import FakeServer, info
from tests.support.inference.server_harness import served_at

ROUND = [START, UPDATE, FINISH, RESET]


class Wire:
    """Both ends of a broadcast: what one puts in, the other takes out."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self.cut: threading.Event | None = None

    def send(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        if self.cut is not None:  # what NCCL does when the other side is gone
            assert self.cut.wait(20)
            raise RuntimeError("cut")
        self.queue.put(tensor.clone())

    def receive(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        came = self.queue.get(timeout=20)
        assert (came.shape, came.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(came)


class Server(FakeServer):
    """Has a worker with vLLM's own receiver; ``held`` is what its model was given in the last round."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.held: dict[str, torch.Tensor] = {}
        config = SimpleNamespace(parallel_config=None, model_config=None)
        model: Any = SimpleNamespace(load_weights=lambda pairs: self.held.update((n, t.clone()) for n, t in pairs))
        self.worker = nccl_engine.NCCLWeightTransferEngine(None, config, torch.device("cpu"), model)  # type: ignore
        self.joined: Any = None
        self.answers |= {
            "/server_info": lambda body: self.says(),
            WORKERS: lambda body: {"world_size": 1},
            INIT: lambda body: self.join(body["init_info"]),
            START: lambda body: self.held.clear() or {},
            UPDATE: lambda body: self.receive(body["update_info"]),
            FINISH: lambda body: {},
        }
        nccl_engine.worker_init_process_group = lambda *_: SimpleNamespace(broadcast=wire.receive)  # type: ignore

    def says(self) -> Any:
        result = info(dtype=str(self.dtype))
        result["vllm_config"]["weight_transfer_config"] = {"backend": "nccl"}
        return result

    def join(self, settings: dict[str, Any]) -> Any:
        self.joined = self.worker.parse_init_info(settings)
        self.worker.init_transfer_engine(self.joined)
        return {}

    def receive(self, settings: dict[str, Any]) -> Any:
        self.worker.receive_weights(self.worker.parse_update_info(settings))
        return {}


def open_at(model_dir: Path, address: str, dtype: torch.dtype = torch.float32, on_hang: Any = None) -> ServerEngine:
    served = served_at(model_dir, [address], dtype, weights="nccl")
    engine = ServerEngine(served, WeightsFolder(served))
    engine.send_weights(checkpoint_weights(model_dir), Watchdog("vllm-server", 30, on_hang))
    return engine


def the_first_weights_come(server: Server, model_dir: Path) -> ServerEngine:
    engine = open_at(model_dir, server.address)
    assert server.paths() == ["/server_info", WORKERS, INIT, *ROUND]
    assert (server.joined.world_size, server.joined.rank_offset) == (2, 1)  # the trainer is rank 0
    assert (server.joined.master_address, server.joined.master_port > 1023) == ("127.0.0.1", True)
    expected = dict(checkpoint_weights(model_dir))
    assert server.held.keys() == expected.keys() | {HEAD}
    assert all(torch.equal(server.held[name], tensor) for name, tensor in expected.items())
    return engine


def a_trained_policy_comes(server: Server, engine: ServerEngine, model_dir: Path) -> None:
    policy = apply_tuning(load_policy(model_dir), LoraTuning(rank=4), seed=1)
    for name, weight in policy.named_parameters():
        weight.data += 0.1 * ("lora_B" in name)
    server.calls.clear()
    engine.load_weights(merged_weights(policy))
    assert server.paths() == ROUND
    assert all(torch.equal(server.held[name], tensor) for name, tensor in merged_weights(policy))
    assert not engine.sender.source.pairs  # type: ignore[union-attr]  # no copy is kept


def weights_come_in_the_engines_type(server: Server, model_dir: Path) -> None:
    server.dtype = torch.bfloat16
    open_at(model_dir, server.address, torch.bfloat16)
    server.dtype = torch.float32
    assert {tensor.dtype for tensor in server.held.values()} == {torch.bfloat16}


def a_part_is_not_sent(server: Server, engine: ServerEngine, model_dir: Path) -> None:
    server.calls.clear()
    some = list(checkpoint_weights(model_dir))[:-1]
    with pytest.raises(ValueError, match="a full set is needed"):
        engine.load_weights(iter(some))
    assert server.paths() == []
    assert not engine.sender.source.pairs  # type: ignore[union-attr]


def failures_are_told(server: Server, wire: Wire, model_dir: Path) -> None:
    engine = open_at(model_dir, server.address)
    healthy = server.answers[UPDATE]
    for answer, error, message in (
        (lambda body: (500, {"error": "no such weight"}), BadReply, "answered /update_weights with status 500"),
        (server.hang, EngineLost, r"did not answer /update_weights within 1 s \(runtime.engine.timeout\)"),
    ):
        engine.client.timeout = 1 if answer == server.hang else 30
        server.answers[UPDATE] = answer
        with pytest.raises(error, match=message):
            engine.load_weights(checkpoint_weights(model_dir))
        while not wire.queue.empty():
            wire.queue.get()
    server.answers[UPDATE] = healthy


def a_broadcast_that_hangs_is_ended(server: Server, wire: Wire, model_dir: Path) -> None:
    messages: list[str] = []
    cut = threading.Event()
    engine = open_at(model_dir, server.address, on_hang=lambda text: messages.append(text) or cut.set())
    wire.cut, engine.sender.watchdog.timeout = cut, 1  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="cut"):
        engine.load_weights(checkpoint_weights(model_dir))
    assert "the vllm-server engine made no progress in 'load_weights' for 1 s" in messages[0]


def main(model_dir: Path) -> None:
    wire = Wire()
    nccl_engine.open_trainer_endpoint = lambda met: SimpleNamespace(broadcast=wire.send)  # type: ignore
    unpacked = functools.partial(nccl_engine.NCCLTrainerInitInfo, packed=False)
    nccl_engine.NCCLTrainerInitInfo = unpacked  # type: ignore  # packing needs streams
    torch.cuda.current_stream = lambda *_: None  # type: ignore
    server = Server(wire)
    engine = the_first_weights_come(server, model_dir)
    a_trained_policy_comes(server, engine, model_dir)
    a_part_is_not_sent(server, engine, model_dir)
    failures_are_told(server, wire, model_dir)
    weights_come_in_the_engines_type(server, model_dir)
    a_broadcast_that_hangs_is_ended(server, wire, model_dir)
    print("all checks passed", flush=True)
    os._exit(0)  # vLLM's sender leaves a thread behind that waits for the other side


if __name__ == "__main__":
    main(Path(sys.argv[1]))
