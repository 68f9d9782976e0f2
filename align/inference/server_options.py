"""Options of a vLLM server that samples as the trainer expects, and the check that a running server has them.

Options and fields as of vLLM 0.31. Leaves out the start (``server_process.py``) and the calls (``server.py``).
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.config.batch_sizes import CPU_STEP_TOKENS
from align.config.runtime import EngineConfig
from align.config.vllm_servers import RolloutsConfig
from align.errors import UserError
from align.inference import nccl
from align.inference.server_client import BadReply, Client, EngineLost
from align.inference.server_guard import HOSTS, KEY_FILE, Guard, key_problem
from align.inference.server_process import BINDING, MODULE
from align.inference.server_worker import WORKER
from align.inference.weights import weight_names
from align.models.loading import load_tokenizer
from align.models.pretrained import open_config

INFO = "/server_info"
ONE_PROCESS = ["--distributed-executor-backend", "vllm.v1.executor.UniProcExecutor"]
"""Run the model in the scheduler's process.

vLLM turns its own word for this, ``uni``, into ``mp`` on a CPU, because only a worker process can be bound to cores.
"""
GUARD = f"{Guard.__module__}.{Guard.__name__}"
"""Name of the middleware, as vLLM's ``--middleware`` takes it."""
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
    """True when the output head is the embedding."""
    vocab_size: int
    """Rows of the output head: every token id is below."""

    @classmethod
    def of(
        cls,
        model_dir: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        config: EngineConfig,
        pool: RolloutsConfig,
        max_length: int,
        seed: int,
    ) -> ServerSpec:
        """Return the spec for a checkpoint, whose configuration and tokenizer are read."""
        tokenizer = load_tokenizer(model_dir)
        architecture = open_config(model_dir)
        return cls(
            model_dir,
            device,
            dtype,
            config,
            pool,
            max_length,
            seed,
            tokenizer,
            eos=int(tokenizer.eos_token_id),
            tensor_names=frozenset(weight_names(model_dir)),
            tied_embeddings=bool(getattr(architecture, "tie_word_embeddings", False)),
            vocab_size=int(architecture.get_text_config().vocab_size),
        )

    def options(self) -> list[str]:
        """Return a server's command-line options; they match those of the in-process engine."""
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
            options += nccl.SERVER_OPTIONS
        if self.device.type != "cpu":
            return [*options, "--gpu-memory-utilization", str(config.gpu_memory)]
        if self.pool.tensor_parallel == 1 and BINDING not in os.environ:
            # A scheduler and its worker wait for each other by spinning, on the cores that compute.
            options += ONE_PROCESS
        # A prompt read in parts makes vLLM wind its request's generator back, which a CPU generator cannot do.
        step_tokens = max(CPU_STEP_TOKENS, self.max_length)
        options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(step_tokens)]
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
            f"{place} the server there answers without a key (status {without_key.status}): anybody could change its "
            f"weights.\n{remedy}"
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
    """Return the settings by which a server differs from one that was started with our options, in words."""
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
    if spec.pool.weights == "nccl" and not nccl.is_offered(config):
        mismatches.append("no weight transfer over NCCL")
    return mismatches
