"""How a vLLM server must be started so that it samples what the trainer expects, and whether one was.

Options and fields as of vLLM 0.31. Left out: starting it (``server_process.py``), asking it (``server.py``).
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
from align.inference.server_process import MODULE
from align.inference.server_worker import WORKER
from align.inference.weights import weight_names
from align.models.loading import load_tokenizer
from align.models.pretrained import open_config

INFO = "/server_info"
GUARD = f"{Guard.__module__}.{Guard.__name__}"
"""As vLLM's ``--middleware`` takes it."""
NEW_KEY = "umask 077; python -c 'import secrets; print(secrets.token_hex(32))' > server.key"


@dataclass(frozen=True)
class Served:
    """What servers answer with, and how: the same for every server of a pool."""

    model_dir: Path
    device: torch.device
    """Of the trainer; servers compute on the same kind."""
    dtype: torch.dtype
    config: EngineConfig
    pool: RolloutsConfig
    max_length: int
    """Tokens of a prompt and its response together, at most."""
    seed: int
    tokenizer: Any
    eos: int
    names: frozenset[str]
    """Tensors that a full set of weights has."""
    tied: bool
    """Whether the output head is the embedding."""
    vocabulary: int
    """Rows of the output head: every token's id is below."""

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
    ) -> Served:
        """Read from a checkpoint what must be known of it."""
        tokenizer = load_tokenizer(model_dir)
        architecture = open_config(model_dir)
        tied = bool(getattr(architecture, "tie_word_embeddings", False))
        vocabulary = int(architecture.get_text_config().vocab_size)
        names, eos = frozenset(weight_names(model_dir)), int(tokenizer.eos_token_id)
        return cls(model_dir, device, dtype, config, pool, max_length, seed, tokenizer, eos, names, tied, vocabulary)

    def options(self) -> list[str]:
        """Options of a server; the same as the in-process engine's."""
        config = self.config
        options = ["--dtype", str(self.dtype).removeprefix("torch."), "--max-model-len", str(self.max_length)]
        options += ["--max-num-seqs", str(config.batch_size), "--logprobs-mode", "processed_logprobs"]
        options += ["--generation-config", "vllm"]  # or the checkpoint's own top-k and penalties would creep in
        options += ["--enable-prefix-caching", "--disable-log-stats"]
        options += ["--middleware", GUARD, "--worker-extension-cls", WORKER]
        if not config.compile:
            options.append("--enforce-eager")
        if self.pool.tensor_parallel > 1:
            options += ["--tensor-parallel-size", str(self.pool.tensor_parallel)]
        if self.pool.weights == "nccl":
            options += nccl.SERVER_OPTIONS
        if self.device.type != "cpu":
            return [*options, "--gpu-memory-utilization", str(config.gpu_memory)]
        # A prompt read in parts makes vLLM wind its request's generator back, which a CPU generator cannot do.
        most = max(CPU_STEP_TOKENS, self.max_length)
        options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(most)]
        return [*options, "--block-size", "32", "--kv-cache-memory-bytes", str(int(config.cpu_kv_cache_gb * 2**30))]


def key_of(pool: RolloutsConfig) -> str:
    """The key of the servers at ``addresses``. Raises ``UserError``, which does not repeat it."""
    name = pool.key_variable
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"runtime.rollouts.addresses names servers, but the environment variable {name} (key_variable) does not "
            f"hold their key. Make one with `{NEW_KEY}`, start the servers with {KEY_FILE}=server.key (docs/ppo.md), "
            f'and run with `export {name}="$(cat server.key)"`.'
        )
    problem = key_problem(key)
    if problem is not None:
        raise UserError(f"runtime.rollouts.key_variable: what {name} holds is no key of a server: {problem}.")
    return key


def refuse_unfit(client: Client, served: Served) -> None:
    """Raise ``UserError`` when a server that somebody else started is not there, lets anybody in, or would sample
    something else."""
    remedy = (
        f"Start it with: {KEY_FILE}=server.key VLLM_SERVER_DEV_MODE=1 python -m {MODULE} --host 127.0.0.1 "
        f"--model MODEL {shlex.join(served.options())}"
    )
    where = f"runtime.rollouts.addresses has {client.address}, but"
    path = f"{INFO}?config_format=json"
    without = client.ask(path, client.timeout, with_key=False)
    if without.error is None and without.status not in (401, 403):
        raise UserError(
            f"{where} the server there answers without a key (status {without.status}): anybody could change its "
            f"weights.\n{remedy}"
        )
    reply = client.ask(path, client.timeout)
    if reply.status in (401, 403):
        raise UserError(
            f"{where} the server there refuses the key in {served.pool.key_variable} (runtime.rollouts.key_variable): "
            f"status {reply.status}. Its {KEY_FILE} must hold the same key, and {HOSTS} there the name in the address "
            "where that is not the machine's."
        )
    try:
        info = client.read(reply)
    except (EngineLost, BadReply) as error:
        raise UserError(f"{where} no vLLM server in development mode answers there: {error}\n{remedy}") from None
    wrong = _differences(client, served, info)
    if wrong:
        raise UserError(f"{where} the server there has {'; '.join(wrong)}.\n{remedy}")


def _differences(client: Client, served: Served, info: Any) -> list[str]:
    """How a server differs from one that was started with our options."""
    config = client.find(INFO, info, "vllm_config")
    extension = client.find(INFO, config, "parallel_config", "worker_extension_cls")
    found = {
        "dtype": str(client.find(INFO, config, "model_config", "dtype")).removeprefix("torch."),
        "logprobs-mode": client.find(INFO, config, "model_config", "logprobs_mode"),
        "generation-config": client.find(INFO, config, "model_config", "generation_config"),
        "max-model-len": client.find(INFO, config, "model_config", "max_model_len"),
        "enable-chunked-prefill": client.find(INFO, config, "scheduler_config", "enable_chunked_prefill"),
    }
    wanted = {"dtype": str(served.dtype).removeprefix("torch."), "logprobs-mode": "processed_logprobs"}
    wanted["generation-config"] = "vllm"
    wrong = [f"{name} {found[name]} instead of {value}" for name, value in wanted.items() if found[name] != value]
    if extension != WORKER:
        wrong.append(f"worker-extension-cls {extension or 'nothing'} instead of {WORKER}")
    if not isinstance(found["max-model-len"], int) or found["max-model-len"] < served.max_length:
        wrong.append(f"max-model-len {found['max-model-len']} instead of {served.max_length} or more")
    on_cpu = str(client.find(INFO, config, "device_config", "device")) == "cpu"
    if on_cpu and found["enable-chunked-prefill"]:
        wrong.append("chunked prefill, which breaks seeded requests on a CPU")
    if served.pool.weights == "nccl" and not nccl.is_offered(client.find(INFO, config)):
        wrong.append("no weight transfer over NCCL")
    return wrong
