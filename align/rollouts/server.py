"""Rollouts by a vLLM server: another process, or another machine, given new weights through a shared folder.

The only file that touches vLLM's HTTP interface: its routes, fields and options as of 0.31 (``/v1/completions``,
``/collective_rpc``, ``/reset_prefix_cache``, ``/server_info``, ``/health``), the middle three of which exist only with
``VLLM_SERVER_DEV_MODE=1``. Every call ends within ``runtime.engine.timeout``, with an answer or with an error that says
whether the server lives. Left out: retries, streaming, tokens scored at other temperatures, and more than one training
process at a server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from align.errors import UserError
from align.models.loading import load_tokenizer
from align.rollouts.protocol import Progress, Response, Sampling
from align.rollouts.vllm import CPU_STEP_TOKENS, EMBEDDING, HEAD
from align.rollouts.weights import checkpoint_weights, weight_names
from align.stage import EngineConfig

MODULE = "vllm.entrypoints.openai.api_server"
"""What ``vllm serve`` runs; that command itself does not start from the CPU build."""
COMPLETIONS, RPC, RESET, INFO = "/v1/completions", "/collective_rpc", "/reset_prefix_cache", "/server_info"
READY = "READY"
"""File that is written last into a folder of weights: without it the folder is not whole."""
SHARD_BYTES = 512 * 2**20
"""Weights held in memory at once while they are written."""
POLL_SECONDS, PROBE_SECONDS, GRACE_SECONDS = 0.25, 1.0, 20.0

GUARD = """
import os, shutil, signal, subprocess, sys, time
parent, folders, grace, stopping = int(sys.argv[1]), sys.argv[2].split(os.pathsep), float(sys.argv[3]), []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
server = subprocess.Popen(sys.argv[4:])
while server.poll() is None and os.getppid() == parent and not stopping:
    time.sleep(0.1)
if server.poll() is None:
    server.terminate()
    try:
        server.wait(grace)
    except subprocess.TimeoutExpired:
        pass
os.killpg(0, signal.SIGTERM)
if os.getppid() != parent:
    time.sleep(1)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
code = server.poll()
sys.exit(1 if code is None else code if code >= 0 else 128 - code)
"""
"""Program between this process and the server: ends the server when this process is gone, however it went. vLLM alone
leaves its engine and worker processes behind when its API process is killed."""


class EngineLost(RuntimeError):
    """The server did not answer, or not in time, or has died."""


class BadReply(RuntimeError):
    """The server answered something other than what was asked for."""


@dataclass(frozen=True)
class _Reply:
    """What came of one call; ``status`` is 0 when nothing came, and then ``error`` says why."""

    path: str
    seconds: float
    status: int = 0
    data: bytes = b""
    error: Exception | None = None


class Client:
    """JSON calls to one server, each of which ends within ``timeout`` seconds."""

    def __init__(self, address: str, timeout: float, server: LocalServer | None = None) -> None:
        """``server`` is the process behind ``address`` where it is ours, for error messages."""
        parts = urlsplit(address)
        self.address, self.host, self.port = address.rstrip("/"), parts.hostname or "", parts.port or 80
        self.timeout, self.server = timeout, server
        self._open: set[socket.socket | None] = set()
        self._lock = threading.Lock()

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """The answer to one call."""
        return self.calls(path, [body], method=method)[0]

    def calls(
        self, path: str, bodies: list[Any], at_once: int = 1, on_progress: Progress | None = None, method: str = "POST"
    ) -> list[Any]:
        """Answers in the order of ``bodies``, of which ``at_once`` are under way at most.

        Raises ``EngineLost`` or ``BadReply`` at the first call that fails, and gives the others up.
        """
        finished: queue.SimpleQueue[Future[_Reply]] = queue.SimpleQueue()
        pool = ThreadPoolExecutor(max(1, min(at_once, len(bodies))), thread_name_prefix="vllm-server")
        given_up = threading.Event()
        try:
            futures = [pool.submit(self._exchange, method, path, body, self.timeout, given_up) for body in bodies]
            places = {future: place for place, future in enumerate(futures)}
            for future in futures:
                future.add_done_callback(finished.put)
            answers: list[Any] = [None] * len(bodies)
            for done in range(1, len(bodies) + 1):
                future = self._next(finished, path)
                answers[places[future]] = self._read(future.result())
                if on_progress is not None:
                    on_progress(done, len(bodies))
            return answers
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            given_up.set()
            self._sever()

    def _next(self, finished: queue.SimpleQueue[Future[_Reply]], path: str) -> Future[_Reply]:
        """The next call to end. A server that sends a byte now and then keeps a socket from timing out, not this."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return finished.get(timeout=POLL_SECONDS)
            seconds = time.monotonic() - began
            if self.server is not None and self.server.process.poll() is not None:
                raise self._lost(_Reply(path, seconds, error=ConnectionError("its process ended")))
            if seconds > self.timeout + PROBE_SECONDS:
                raise self._lost(_Reply(path, seconds, error=TimeoutError()))

    def _exchange(
        self, method: str, path: str, body: Any, timeout: float, given_up: threading.Event | None = None
    ) -> _Reply:
        """One call, in a thread of its own. Nothing is raised: the caller asks for the state of the server first."""
        began = time.monotonic()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        opened = None
        try:
            connection.connect()
            opened = connection.sock  # the connection itself forgets it before the answer is read
            with self._lock:
                self._open.add(opened)
            if given_up is not None and given_up.is_set():
                raise ConnectionAbortedError("given up before it was sent")
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            data = response.read()
            return _Reply(path, time.monotonic() - began, response.status, data)
        except (OSError, http.client.HTTPException) as error:
            return _Reply(path, time.monotonic() - began, error=error)
        finally:
            with self._lock:
                self._open.discard(opened)
            connection.close()

    def _sever(self) -> None:
        """End calls still under way, so that no thread is left waiting; vLLM drops the requests behind them."""
        with self._lock:
            for one in self._open:
                if one is not None:
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)

    def _read(self, reply: _Reply) -> Any:
        if reply.error is not None:
            raise self._lost(reply)
        if reply.status >= 500 and self.health() != "answers":
            raise EngineLost(
                f"the vLLM server at {self.address} failed at {reply.path} with status {reply.status}: "
                f"{_short(reply.data)}. {self.state()}"
            )
        if reply.status != 200:
            raise BadReply(
                f"the vLLM server at {self.address} answered {reply.path} with status {reply.status}: "
                f"{_short(reply.data)}"
            )
        try:
            return json.loads(reply.data)
        except ValueError:
            raise self.unexpected(reply.path, "it is not JSON", reply.data) from None

    def unexpected(self, path: str, what: str, got: Any) -> BadReply:
        """The error for an answer that is not what vLLM 0.31 gives."""
        return BadReply(
            f"the vLLM server at {self.address} gave an answer to {path} that cannot be used: {what}. It began with "
            f"{_short(got)}. Is it a vLLM server, of a version that align supports (pyproject.toml, extra vllm)?"
        )

    def find(self, path: str, answer: Any, *keys: str | int) -> Any:
        """A part of an answer. Raises ``BadReply`` when it is not there."""
        found = answer
        for key in keys:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                raise self.unexpected(path, f"it lacks {'.'.join(map(str, keys))}", answer) from None
        return found

    def _lost(self, reply: _Reply) -> EngineLost:
        if isinstance(reply.error, TimeoutError):
            what = f"did not answer {reply.path} within {self.timeout:g} s (runtime.engine.timeout)"
        else:
            what = (
                f"could not be asked for {reply.path}: {type(reply.error).__name__}: {reply.error}, after "
                f"{reply.seconds:.1f} s of at most {self.timeout:g}"
            )
        return EngineLost(f"the vLLM server at {self.address} {what}. {self.state()}")

    def health(self) -> str:
        """What ``/health`` says, in words: ``answers`` when all is well."""
        reply = self._exchange("GET", "/health", None, min(PROBE_SECONDS, self.timeout))
        if reply.error is not None:
            return "does not answer"
        return "answers" if reply.status == 200 else f"answers with status {reply.status}"

    def state(self) -> str:
        """Whether the server lives, as far as can be seen from here, and the end of its log."""
        if self.server is None:
            return f"This run did not start it, so its process cannot be seen from here; /health {self.health()}."
        return f"Its process {self.server.life()}; /health {self.health()}.{self.server.last_words()}"


def _short(got: Any, limit: int = 300) -> str:
    text = got.decode("utf-8", "replace") if isinstance(got, bytes) else json.dumps(got)
    return text if len(text) <= limit else f"{text[:limit]}..."


class LocalServer:
    """A server process that belongs to this one: it ends with ``end``, and with this process."""

    def __init__(self, command: list[str], folders: list[Path]) -> None:
        """Start ``command``. Its log and temporary files go to the first folder; all go if this process is killed."""
        self.log, self._ended = folders[0] / "server.log", False
        guard = [sys.executable, "-I", "-c", GUARD, str(os.getpid()), os.pathsep.join(map(str, folders))]
        guard.append(str(GRACE_SECONDS))
        with self.log.open("ab") as output:
            # A session of its own, so that the whole group can be ended; the guard sees to it that none outlives us.
            self.process = subprocess.Popen(
                [*guard, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=_environment(folders[0]), start_new_session=True,
            )  # fmt: skip

    def life(self) -> str:
        """Whether the process is alive, in words."""
        try:
            code = self.process.wait(2 * POLL_SECONDS)  # a connection breaks before the process that broke it is gone
        except subprocess.TimeoutExpired:
            return f"(pid {self.process.pid}) is alive"
        number = -code if code < 0 else code - 128  # the guard's own signal, or the server's as shells tell it
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(number).name}"
        return f"ended with exit code {code}"

    def last_words(self, lines: int = 12) -> str:
        """The end of its log, as a sentence, or nothing."""
        with contextlib.suppress(OSError):
            text = self.log.read_bytes()[-8192:].decode("utf-8", "replace").strip()
            return "\nThe end of its log:\n" + "\n".join(text.splitlines()[-lines:]) if text else ""
        return ""

    def end(self) -> None:
        """End the process and its whole group: politely, which frees its shared memory, then not."""
        if self._ended:
            return
        self._ended = True
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS + 1)
        if not self._gone_within(GRACE_SECONDS):  # workers clean up for some seconds after a server that was killed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._gone_within(GRACE_SECONDS)
        self.process.wait()

    def _gone_within(self, seconds: float) -> bool:
        """Wait until no process of the group is left, those aside that only wait for their parent to look."""
        deadline = time.monotonic() + seconds
        while any(_in_group(process, self.process.pid) for process in psutil.process_iter()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def _in_group(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _environment(folder: Path) -> dict[str, str]:
    """Settings of the server's process; the user's own values win, except where the engine depends on them."""
    # The in-process engine sets the first, without which no server starts; calls send no key; the server is no part of
    # what a launcher started.
    dropped = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY"}
    dropped |= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    # Bound to cores, vLLM's CPU worker leaves one to the scheduler, which hardly uses it: half of a small machine.
    return quiet | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | kept | {"VLLM_SERVER_DEV_MODE": "1", "TMPDIR": str(folder)}


def server_options(dtype: torch.dtype, device: torch.device, config: EngineConfig, max_length: int) -> list[str]:
    """Options of a server that samples what the trainer expects; the same as the in-process engine's."""
    options = ["--dtype", str(dtype).removeprefix("torch."), "--max-model-len", str(max_length)]
    options += ["--max-num-seqs", str(config.batch_size), "--logprobs-mode", "processed_logprobs"]
    options += ["--generation-config", "vllm"]  # or the checkpoint's own top-k and penalties would creep in
    options += ["--enable-prefix-caching", "--disable-log-stats"]
    if not config.compile:
        options.append("--enforce-eager")
    if device.type != "cpu":
        return [*options, "--gpu-memory-utilization", str(config.gpu_memory)]
    # A prompt read in parts makes vLLM wind its request's generator back, which a CPU generator cannot do.
    options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(CPU_STEP_TOKENS, max_length))]
    return [*options, "--block-size", "32", "--kv-cache-memory-bytes", str(int(config.cpu_kv_cache_gb * 2**30))]


def start_server(model_dir: Path, options: list[str], seed: int, timeout: float, folders: list[Path]) -> Client:
    """Start a server on this machine, for this machine only, and wait until it answers.

    Raises ``EngineLost`` with the end of its log when it ends, or does not answer within ``timeout`` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", MODULE, "--host", "127.0.0.1", "--port", str(port), "--model", str(model_dir)]
    command += [*options, "--seed", str(seed % 2**32), "--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    command.append("--skip-tokenizer-init")  # tokens go in and out as ids; turning them into text took a third of it
    server = LocalServer(command, folders)
    client = Client(f"http://127.0.0.1:{port}", timeout, server)
    began = time.monotonic()
    try:
        while client.health() != "answers":
            if server.process.poll() is not None or time.monotonic() - began > timeout:
                raise EngineLost(
                    f"the vLLM server at {client.address} was not ready after {time.monotonic() - began:.0f} s of at "
                    f"most {timeout:g} (runtime.engine.timeout). {client.state()}"
                )
            time.sleep(POLL_SECONDS)
    except BaseException:
        server.end()
        raise
    return client


def refuse_unfit(client: Client, options: list[str], dtype: torch.dtype, max_length: int) -> None:
    """Raise ``UserError`` when a server that somebody else started is not there, or would sample something else."""
    remedy = f"Start it with: VLLM_SERVER_DEV_MODE=1 python -m {MODULE} --model MODEL {' '.join(options)}"
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
    if wrong:
        raise UserError(f"{where} the server there has {'; '.join(wrong)}.\n{remedy}")


class ServerEngine:
    """A :class:`~align.rollouts.protocol.RolloutEngine` around one vLLM server, started here or running already."""

    name = "vllm-server"

    def __init__(
        self,
        model_dir: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        config: EngineConfig,
        max_length: int,
        seed: int,
    ) -> None:
        """Start a server for sequences of at most ``max_length`` tokens, or give the one at ``config.address`` the
        weights of ``model_dir``. Raises ``UserError`` when that one is unfit, ``EngineLost`` when none starts."""
        from transformers import AutoConfig

        self.model_dir, self.dtype, self.batch_size = model_dir, dtype, config.batch_size
        self.tokenizer = load_tokenizer(model_dir)
        self.eos = int(self.tokenizer.eos_token_id)
        self.names = weight_names(model_dir)
        self.tied = bool(getattr(AutoConfig.from_pretrained(model_dir), "tie_word_embeddings", False))
        self.version = 0
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
            seen = write_shards(_with_head(weights, self.tied), partial, self.dtype)
            missing = self.names - seen
            if missing:
                raise ValueError(f"the new weights lack {', '.join(sorted(missing)[:3])}: a full set is needed")
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


def _with_head(weights: Iterable[tuple[str, torch.Tensor]], tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Add the head of a model with tied embeddings.

    vLLM's CPU backend keeps a packed copy of the head: without the head under its own name the sampler goes on with
    the old one, silently.
    """
    embedding, seen = None, False
    for name, tensor in weights:
        seen = seen or name == HEAD
        if name == EMBEDDING:
            embedding = tensor
        yield name, tensor
    if tied and not seen and embedding is not None:
        yield HEAD, embedding


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
