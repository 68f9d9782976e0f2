"""Rollouts by a vLLM server: another process, or machine, given new weights through a shared folder, or over NCCL.

With ``server_process.py`` and ``nccl.py`` all that touches vLLM's HTTP interface: routes, fields and options as of 0.31
(``/v1/completions``, ``/collective_rpc``, ``/reset_prefix_cache``, ``/server_info``, ``/health``), the middle three of
which exist only with ``VLLM_SERVER_DEV_MODE=1``. Every call ends within ``runtime.engine.timeout``, with an answer or
an error that says whether the server lives. Left out: retries, streaming, tokens scored at other temperatures, and
more than one training process at a server.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from align.errors import UserError
from align.models.loading import load_tokenizer
from align.rollouts import nccl
from align.rollouts.protocol import Progress, Response, Sampling
from align.rollouts.server_client import POLL_SECONDS, BadReply, Client, EngineLost
from align.rollouts.server_process import GRACE_SECONDS, MODULE, start_server
from align.rollouts.vllm import CPU_STEP_TOKENS
from align.rollouts.watchdog import Watchdog
from align.rollouts.weights import checkpoint_weights, refuse_missing, weight_names, with_tied_head
from align.runtime import EngineConfig

COMPLETIONS, RPC, RESET, INFO = "/v1/completions", "/collective_rpc", "/reset_prefix_cache", "/server_info"
READY = "READY"
"""File that is written last into a folder of weights: without it the folder is not whole."""
SHARD_BYTES = 512 * 2**20
"""Weights held in memory at once while they are written."""


def server_options(dtype: torch.dtype, device: torch.device, config: EngineConfig, max_length: int) -> list[str]:
    """Options of a server that samples what the trainer expects; the same as the in-process engine's."""
    options = ["--dtype", str(dtype).removeprefix("torch."), "--max-model-len", str(max_length)]
    options += ["--max-num-seqs", str(config.batch_size), "--logprobs-mode", "processed_logprobs"]
    options += ["--generation-config", "vllm"]  # or the checkpoint's own top-k and penalties would creep in
    options += ["--enable-prefix-caching", "--disable-log-stats"]
    if not config.compile:
        options.append("--enforce-eager")
    if config.weights == "nccl":
        options += nccl.SERVER_OPTIONS
    if device.type != "cpu":
        return [*options, "--gpu-memory-utilization", str(config.gpu_memory)]
    # A prompt read in parts makes vLLM wind its request's generator back, which a CPU generator cannot do.
    options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(CPU_STEP_TOKENS, max_length))]
    return [*options, "--block-size", "32", "--kv-cache-memory-bytes", str(int(config.cpu_kv_cache_gb * 2**30))]


def refuse_unfit(client: Client, options: list[str], dtype: torch.dtype, max_length: int) -> None:
    """Raise ``UserError`` when a server that somebody else started is not there, or would sample something else."""
    remedy = f"Start it with: VLLM_SERVER_DEV_MODE=1 python -m {MODULE} --model MODEL {shlex.join(options)}"
    where = f"runtime.engine.address is {client.address}, but"
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
    wanted = {"dtype": str(dtype).removeprefix("torch."), "logprobs-mode": "processed_logprobs"}
    wanted["generation-config"] = "vllm"
    wrong = [f"{name} {found[name]} instead of {value}" for name, value in wanted.items() if found[name] != value]
    if found["max-model-len"] < max_length:
        wrong.append(f"max-model-len {found['max-model-len']} instead of {max_length} or more")
    on_cpu = str(client.find(INFO, config, "device_config", "device")) == "cpu"
    if on_cpu and found["enable-chunked-prefill"]:
        wrong.append("chunked prefill, which breaks seeded requests on a CPU")
    if "--weight-transfer-config" in options and not nccl.is_offered(client.find(INFO, config)):
        wrong.append("no weight transfer over NCCL")
    if wrong:
        raise UserError(f"{where} the server there has {'; '.join(wrong)}.\n{remedy}")


class ServerEngine:
    """A :class:`~align.rollouts.protocol.RolloutEngine` around one vLLM server, started here or running already."""

    name = "vllm-server"
    sender: nccl.NcclSender | None

    def __init__(
        self,
        model_dir: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        config: EngineConfig,
        max_length: int,
        seed: int,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Start a server for sequences of at most ``max_length`` tokens, or give the one at ``config.address`` the
        weights of ``model_dir``. Raises ``UserError`` when that one is unfit, ``EngineLost`` when none starts."""
        from transformers import AutoConfig

        self.model_dir, self.dtype, self.batch_size = model_dir, dtype, config.batch_size
        self.tokenizer = load_tokenizer(model_dir)
        self.eos = int(self.tokenizer.eos_token_id)
        self.names = weight_names(model_dir)
        self.tied = bool(getattr(AutoConfig.from_pretrained(model_dir), "tie_word_embeddings", False))
        self.version, self.sender = 0, None
        self._temporary = contextlib.ExitStack()
        self.weights_folder = self._folder(config.weights_folder)
        options = server_options(dtype, device, config, max_length)
        try:
            if config.address is None:
                folders = [self._folder(None), self.weights_folder]
                self.client = start_server(model_dir, options, seed, config.timeout, folders)
            else:
                self.client = Client(config.address, config.timeout)
                refuse_unfit(self.client, options, dtype, max_length)
                if config.weights == "nccl":
                    watched = watchdog or Watchdog(self.name, config.timeout)
                    self.sender = nccl.NcclSender(self.client, device, dtype, watched)
                self.load_weights(checkpoint_weights(model_dir))
        except BaseException:
            self._temporary.close()
            raise

    def _folder(self, inside: str | None) -> Path:
        """A new folder that ``close`` removes."""
        outer = None if inside is None else Path(inside).expanduser().absolute()
        if outer is not None:
            outer.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="align-", dir=outer, ignore_cleanup_errors=True)
        folder = Path(self._temporary.enter_context(made))
        if outer is not None:
            folder.chmod(0o755)  # the server may run as another user; the outer folder says who gets in
        return folder

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """See the protocol."""
        requests = [(index, sample) for index in range(len(prompts)) for sample in range(sampling.n)]
        bodies = [
            {
                "prompt": prompts[index],
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": sampling.request_seed(index, sample),
                "stop_token_ids": [self.eos],
                "ignore_eos": True,  # only our end token stops; configs of some models name others
                "logprobs": 0,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,  # or every token is decoded once more, for a field nobody reads
            }
            for index, sample in requests
        ]
        answers = self.client.calls(COMPLETIONS, bodies, self.batch_size, on_progress)
        found = [self._sampled(body, answer) for body, answer in zip(bodies, answers, strict=True)]
        texts = self.tokenizer.batch_decode([tokens for tokens, _ in found], skip_special_tokens=True)
        responses: list[list[Response]] = [[] for _ in prompts]
        for (index, _), (tokens, logprobs), text in zip(requests, found, texts, strict=True):
            responses[index].append(Response(tokens, logprobs, tokens[-1] == self.eos, text))
        return responses

    def _sampled(self, body: dict[str, Any], answer: Any) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities of an answer that holds exactly what ``body`` asked for. Raises ``BadReply``."""
        choice = self._choice(body["prompt"], answer)
        tokens = self.client.find(COMPLETIONS, choice, "token_ids")
        logprobs = self.client.find(COMPLETIONS, choice, "logprobs", "token_logprobs")
        reason = self.client.find(COMPLETIONS, choice, "finish_reason")
        wrong = None
        if not _all(tokens, int) or not 1 <= len(tokens) <= body["max_tokens"]:
            wrong = f"token_ids is no list of 1 to {body['max_tokens']} tokens"
        elif not _all(logprobs, float | int) or len(logprobs) != len(tokens):
            wrong = f"token_logprobs is no list of {len(tokens)} numbers"
        elif reason not in ("stop", "length") or (reason == "stop") != (tokens[-1] == self.eos):
            wrong = f"it ended with '{reason}' at token {tokens[-1]}, where {self.eos} is the one that ends a turn"
        if wrong is not None:
            raise self.client.unexpected(COMPLETIONS, wrong, choice)
        return tokens, [float(value) for value in logprobs]

    def _choice(self, prompt: list[int], answer: Any) -> Any:
        """The one choice of an answer to ``prompt``. Raises ``BadReply`` for another count, or another prompt."""
        choices = self.client.find(COMPLETIONS, answer, "choices")
        if not isinstance(choices, list) or len(choices) != 1:
            raise self.client.unexpected(COMPLETIONS, "choices is no list of one choice", answer)
        if self.client.find(COMPLETIONS, choices[0], "prompt_token_ids") != prompt:
            raise self.client.unexpected(COMPLETIONS, "prompt_token_ids is not the prompt that was sent", answer)
        return choices[0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See the protocol. Raises ``BadReply`` when the server cannot read the folder, or what lies in it."""
        if self.sender is not None:
            self.sender.send(with_tied_head(weights, self.tied), self.names)
            self._forget_prefixes()
            return
        self.version += 1
        folder = self.weights_folder / f"step_{self.version}"
        self._write(weights, folder)
        try:
            answer = self.client.call(RPC, {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        except BadReply as error:
            raise BadReply(
                f"{error}. It was told to read new weights from {folder}: can it, under this very path? "
                "runtime.engine.weights_folder names a folder that both sides see."
            ) from None
        results = self.client.find(RPC, answer, "results")
        if not isinstance(results, list) or not results or any(result is not None for result in results):
            raise self.client.unexpected(RPC, "results is no list of nulls, one per worker", answer)
        self._forget_prefixes()
        for old in self.weights_folder.glob("step_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def _write(self, weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
        """Write a whole model folder: under another name until it is complete, its marker last."""
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir()
        try:
            refuse_missing(self.names, write_shards(with_tied_head(weights, self.tied), partial, self.dtype))
            for file in self.model_dir.iterdir():  # configuration and tokenizer
                if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, partial / file.name)
            partial.rename(folder)
            (folder / READY).touch()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _forget_prefixes(self) -> None:
        """Drop the old weights' keys and values. Refused while requests hold blocks: given-up ones do, for a while."""
        deadline = time.monotonic() + min(GRACE_SECONDS, self.client.timeout)
        while self.client.find(RESET, self.client.call(RESET), "success") is not True:
            if time.monotonic() > deadline:
                raise RuntimeError("vLLM kept its prefix cache across a change of weights: requests still hold blocks")
            time.sleep(POLL_SECONDS)

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """See the protocol. ``temperature`` must be 1: vLLM scores given tokens before temperature."""
        if temperature != 1:
            raise ValueError("vLLM gives log-probabilities of given tokens at temperature 1 only")
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": True}
        answers = self.client.calls(COMPLETIONS, [{"prompt": row, **settings} for row in rows], self.batch_size)
        found = []
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            given = self.client.find(COMPLETIONS, self._choice(row, answer), "prompt_logprobs")
            places = range(len(prompt), len(row))
            values = [self.client.find(COMPLETIONS, given, place, str(row[place]), "logprob") for place in places]
            found.append([float(value) for value in values])
        return found

    def close(self) -> None:
        """See the protocol. A server that was running already goes on, with the last weights it was given."""
        if self.client.server is not None:
            self.client.server.end()
        self._temporary.close()


def _all(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype) -> set[str]:
    """Write safetensors of about ``SHARD_BYTES`` and their index; floating-point tensors in ``dtype``. The names."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in weights:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        # A copy of its own: safetensors refuses tensors that share memory, as a tied head does.
        copy = tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        if shard and size + copy.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = copy
        size += copy.nbytes
    flush()
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return set(index)
