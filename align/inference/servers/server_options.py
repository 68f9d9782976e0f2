"""Options of a vLLM server that samples as the trainer expects, and the check that a running server has them.

Options and fields as of vLLM 0.31. Leaves out the start (``server_process.py``) and the calls (``server.py``).

Weight transfer to a vLLM server on other GPUs, from GPU to GPU over NCCL.

Uses vLLM's own weight transfer: the public names of ``vllm.distributed.weight_transfer`` and the routes of its
development mode, as of 0.31. Both sides first form a process group at a port that is opened here. Each update is then
started, announced (names, types, shapes), broadcast and finished. The client bounds the control calls. A broadcast
whose other side is gone hangs in native code, so a watchdog covers all of it. Leaves out a server on the trainer's GPU
(NCCL wants one GPU per rank), several training processes, and updates that hold only what changed.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.config.runtime import EngineConfig
from align.config.runtime.rollouts import CPU_STEP_TOKENS, RolloutsConfig
from align.errors import UserError
from align.inference.protocol import Watchdog
from align.inference.server_guard import HOSTS, KEY_FILE, Guard, key_problem
from align.inference.server_worker import WORKER
from align.inference.servers.server_client import UNIX, BadReply, Client, EngineLost
from align.inference.servers.server_process import BINDING, MODULE, free_port
from align.inference.weights import needs_tied_head, refuse_missing, weight_names
from align.models.fast.stateful_layers import carries_state
from align.models.loading import load_tokenizer
from align.models.pretrained import open_config

INFO = "/server_info"
ONE_PROCESS = ["--distributed-executor-backend", "vllm.v1.executor.UniProcExecutor"]
"""Run the model in the scheduler's process.

vLLM turns its own word for this, ``uni``, into ``mp`` on a CPU, because only a worker process can be bound to cores.
"""
GUARD = f"{Guard.__module__}.{Guard.__name__}"
"""Name of the middleware, as vLLM's ``--middleware`` expects it."""
KEY_COMMAND = "umask 077; python -c 'import secrets; print(secrets.token_hex(32))' > server.key"


@dataclass(frozen=True)
class ServerSpec:
    """Model, settings and sizes that every server of a pool shares."""

    model_dir: Path
    device: torch.device
    """The trainer's device; servers compute on the same kind."""
    dtype: torch.dtype
    config: EngineConfig
    pool: RolloutsConfig
    max_length: int
    """Tokens of a prompt and its response together, at most."""
    seed: int
    tokenizer: Any
    eos: int
    tensor_names: frozenset[str]
    """Tensors that a full set of weights has."""
    tied_embeddings: bool
    """True if the output head is the embedding and a server needs it under both names."""
    vocab_size: int
    """Rows of the output head: every token id is below."""

    @classmethod
    def of(cls, model_dir: Path, **settings: Any) -> ServerSpec:
        """Return the spec for a checkpoint, whose configuration and tokenizer are read.

        ``settings`` are the fields from ``device`` to ``seed``.
        """
        tokenizer = load_tokenizer(model_dir)
        architecture = open_config(model_dir)
        return cls(
            model_dir,
            **settings,
            tokenizer=tokenizer,
            eos=int(tokenizer.eos_token_id),
            tensor_names=frozenset(weight_names(model_dir)),
            tied_embeddings=needs_tied_head(architecture),
            vocab_size=int(architecture.get_text_config().vocab_size),
        )

    def options(self) -> list[str]:
        """Return a server's command-line options; they match the in-process engine's options."""
        config = self.config
        options = ["--dtype", str(self.dtype).removeprefix("torch."), "--max-model-len", str(self.max_length)]
        options += ["--max-num-seqs", str(config.batch_size), "--logprobs-mode", "processed_logprobs"]
        options += ["--generation-config", "vllm"]  # or the checkpoint's own top-k and penalties would creep in
        options += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-log-stats"]
        options += ["--middleware", GUARD, "--worker-extension-cls", WORKER]
        if not config.compile:
            options.append("--enforce-eager")
        if self.pool.tensor_parallel > 1:
            options += ["--tensor-parallel-size", str(self.pool.tensor_parallel)]
        if self.pool.weights == "nccl":
            options += SERVER_OPTIONS
        if self.device.type != "cpu":
            return [*options, "--gpu-memory-utilization", str(config.gpu_share)]
        if self.pool.tensor_parallel == 1 and BINDING not in os.environ:
            # A scheduler and its worker wait for each other by spinning, on the cores that compute.
            options += ONE_PROCESS
        # A prompt read in parts makes vLLM wind its request's generator back, which a CPU generator cannot do.
        step_tokens = max(CPU_STEP_TOKENS, self.max_length)
        options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(step_tokens)]
        if carries_state(open_config(self.model_dir)):
            options.append("--no-enable-prefix-caching")  # states of prefixes are cached only with chunked prefill
        return [*options, "--block-size", "32", "--kv-cache-memory-bytes", str(int(config.cpu_kv_cache_gb * 2**30))]


def read_key(pool: RolloutsConfig) -> str:
    """Return the key of the servers at ``addresses``. Raises ``UserError``, which does not repeat it."""
    name = pool.key_variable
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"runtime.rollouts.addresses names servers, but the environment variable {name} (key_variable) does not "
            f"hold their key. Make one with `{KEY_COMMAND}`, start the servers with {KEY_FILE}=server.key "
            f'(docs/ppo.md), and run with `export {name}="$(cat server.key)"`.'
        )
    problem = key_problem(key)
    if problem is not None:
        raise UserError(f"runtime.rollouts.key_variable: what {name} holds is no key of a server: {problem}.")
    return key


def check_server(client: Client, spec: ServerSpec) -> None:
    """Raise ``UserError`` for a running server that is not there, answers without a key, or would sample otherwise."""
    remedy = (
        f"Start it with: {KEY_FILE}=server.key VLLM_SERVER_DEV_MODE=1 python -m {MODULE} --host 127.0.0.1 "
        f"--model MODEL {shlex.join(spec.options())}"
    )
    place = f"runtime.rollouts.addresses has {client.address}, but"
    path = f"{INFO}?config_format=json"
    # 1. Without a key every route must be closed: /collective_rpc changes weights.
    without_key = client.exchange("GET", path, with_key=False)
    if without_key.error is None and without_key.status not in (401, 403):
        raise UserError(
            f"{place} it needs no key (status {without_key.status}), so anybody can change its weights.\n{remedy}"
        )
    # 2. Ours must be its key.
    reply = client.exchange("GET", path)
    if reply.status in (401, 403):
        raise UserError(
            f"{place} the server there refuses the key in {spec.pool.key_variable} (runtime.rollouts.key_variable): "
            f"status {reply.status}. Its {KEY_FILE} must hold the same key, and {HOSTS} there the name in the address "
            "where that is not the machine's."
        )
    # 3. Its options must be those that we would start it with.
    try:
        info = client.read(reply)
    except (EngineLost, BadReply) as error:
        raise UserError(f"{place} no vLLM server in development mode answers there: {error}\n{remedy}") from None
    mismatches = _mismatches(client, spec, info)
    if mismatches:
        raise UserError(f"{place} the server there has {'; '.join(mismatches)}.\n{remedy}")


def _mismatches(client: Client, spec: ServerSpec, info: Any) -> list[str]:
    """Return the settings by which a server differs from a server that was started with our options, in words."""
    config = client.find(INFO, info, "vllm_config")

    def setting(*keys: str) -> Any:
        return client.find(INFO, config, *keys)

    expected = {
        "dtype": str(spec.dtype).removeprefix("torch."),
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
    }
    actual = {
        "dtype": str(setting("model_config", "dtype")).removeprefix("torch."),
        "logprobs-mode": setting("model_config", "logprobs_mode"),
        "generation-config": setting("model_config", "generation_config"),
    }
    extension = setting("parallel_config", "worker_extension_cls")
    max_length = setting("model_config", "max_model_len")
    chunks_prefill = setting("scheduler_config", "enable_chunked_prefill")
    mismatches = [
        f"{name} {actual[name]} instead of {value}" for name, value in expected.items() if actual[name] != value
    ]
    if extension != WORKER:
        mismatches.append(f"worker-extension-cls {extension or 'nothing'} instead of {WORKER}")
    if not isinstance(max_length, int) or max_length < spec.max_length:
        mismatches.append(f"max-model-len {max_length} instead of {spec.max_length} or more")
    if str(setting("device_config", "device")) == "cpu" and chunks_prefill:
        mismatches.append("chunked prefill, which breaks seeded requests on a CPU")
    if spec.pool.weights == "nccl" and not is_offered(config):
        mismatches.append("no weight transfer over NCCL")
    return mismatches


INIT = "/init_weight_transfer_engine"
WORKERS = "/get_world_size"
START = "/start_weight_update"
UPDATE = "/update_weights"
FINISH = "/finish_weight_update"
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
        self.device = device
        self.dtype = dtype
        self.watchdog = watchdog
        self.source = TensorSource()
        try:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise UserError(
                f"runtime.rollouts.weights is nccl, but vLLM's sender does not import here ({error}). Install vLLM "
                "0.31 on the trainer's side as well, or use `weights: folder`."
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
