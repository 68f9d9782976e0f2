"""How a vLLM server must be started so that it samples what the trainer expects, and whether one was.

Options and fields as of vLLM 0.31. Left out: starting it (``server_process.py``), asking it (``server.py``).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.errors import UserError
from align.models.inference import CPU_STEP_TOKENS
from align.models.loading import load_tokenizer
from align.models.pretrained import open_config
from align.pool_config import RolloutsConfig
from align.rollouts import nccl
from align.rollouts.server_client import BadReply, Client, EngineLost
from align.rollouts.server_process import MODULE
from align.rollouts.weights import weight_names
from align.runtime import EngineConfig

INFO = "/server_info"


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
        tied = bool(getattr(open_config(model_dir), "tie_word_embeddings", False))
        names, eos = frozenset(weight_names(model_dir)), int(tokenizer.eos_token_id)
        return cls(model_dir, device, dtype, config, pool, max_length, seed, tokenizer, eos, names, tied)

    def options(self) -> list[str]:
        """Options of a server; the same as the in-process engine's."""
        config = self.config
        options = ["--dtype", str(self.dtype).removeprefix("torch."), "--max-model-len", str(self.max_length)]
        options += ["--max-num-seqs", str(config.batch_size), "--logprobs-mode", "processed_logprobs"]
        options += ["--generation-config", "vllm"]  # or the checkpoint's own top-k and penalties would creep in
        options += ["--enable-prefix-caching", "--disable-log-stats"]
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


def refuse_unfit(client: Client, served: Served) -> None:
    """Raise ``UserError`` when a server that somebody else started is not there, or would sample something else."""
    remedy = f"Start it with: VLLM_SERVER_DEV_MODE=1 python -m {MODULE} --model MODEL {shlex.join(served.options())}"
    where = f"runtime.rollouts.addresses has {client.address}, but"
    try:
        info = client.call(f"{INFO}?config_format=json", method="GET")
    except (EngineLost, BadReply) as error:
        raise UserError(f"{where} no vLLM server in development mode answers there: {error}\n{remedy}") from None
    config = client.find(INFO, info, "vllm_config")
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
    if found["max-model-len"] < served.max_length:
        wrong.append(f"max-model-len {found['max-model-len']} instead of {served.max_length} or more")
    on_cpu = str(client.find(INFO, config, "device_config", "device")) == "cpu"
    if on_cpu and found["enable-chunked-prefill"]:
        wrong.append("chunked prefill, which breaks seeded requests on a CPU")
    if served.pool.weights == "nccl" and not nccl.is_offered(client.find(INFO, config)):
        wrong.append("no weight transfer over NCCL")
    if wrong:
        raise UserError(f"{where} the server there has {'; '.join(wrong)}.\n{remedy}")
