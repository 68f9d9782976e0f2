"""One vLLM server as a rollout engine: requests, checks of replies, new weights.

With ``server_process.py``, ``server_options.py`` and ``server_worker.py`` this is all that touches vLLM's
HTTP interface, as of 0.31: ``/v1/completions``, ``/collective_rpc``, ``/reset_prefix_cache``, ``/server_info`` and
``/health``, of which the middle three exist only with ``VLLM_SERVER_DEV_MODE=1``. Every call ends within
``runtime.engine.timeout``, with a reply or with an error that says whether the server lives. Leaves out retries and
several servers (``pool.py``), streaming, and scores at other temperatures.

One server of a pool: what it holds, and whether it can be used. ``pool.py`` decides that.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from align.inference.protocol import Progress, Response, Sampling, TurnRequest, Watchdog
from align.inference.server_worker import LOAD, NAME, REPORT
from align.inference.servers.server_client import POLL_SECONDS, BadReply, Client, EngineLost, WeightsChanged
from align.inference.servers.server_options import NcclSender, ServerSpec, check_server, read_key
from align.inference.servers.server_process import GRACE_SECONDS, Placement, ServerLaunch, start_server
from align.inference.weights import Weights, WeightsFolder, with_stored_names, with_tied_head

COMPLETIONS = "/v1/completions"
RPC = "/collective_rpc"
RESET = "/reset_prefix_cache"
MAX_LOGPROB = 1e-3
"""A log-probability is at most 0, but for the rounding of float32."""


class ServerEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around one vLLM server, started here or running already."""

    name = "vllm-server"
    sender: NcclSender | None = None

    def __init__(
        self,
        spec: ServerSpec,
        folder: WeightsFolder,
        number: int = 0,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Start server ``number`` of the pool with the weights of ``spec.model_dir``, or connect to its address.

        A server that was running already holds whatever it was given last. Raises ``UserError`` when it is unfit, and
        ``EngineLost`` when none starts, or when ``cancelled`` is set meanwhile.
        """
        self.spec = spec
        self.folder = folder
        self.number = number
        self.dtype = spec.dtype
        self.batch_size = spec.config.batch_size
        self.tokenizer = spec.tokenizer
        self.eos = spec.eos
        self.held_weights: list[dict[str, Any]] = []
        """Each worker's report when the server was started or given weights last; empty before."""
        self.sent_versions = 0
        """Versions that went over NCCL."""
        pool = spec.pool
        timeout = spec.config.timeout
        if pool.addresses:
            self.client = Client(pool.addresses[number], timeout, read_key(pool))
            check_server(self.client, spec)
            return
        launch = ServerLaunch(
            spec.model_dir,
            spec.options(),
            spec.seed,
            timeout,
            folders=[folder.temporary(), folder.path],
            placement=Placement.of(pool, number, spec.device.type),
        )
        self.client = start_server(launch, cancelled)
        try:
            # The worker starts to count loads with its first report.
            self.held_weights = self._call_workers(REPORT, content=True)
        except BaseException:
            self.end()
            raise

    @property
    def is_local(self) -> bool:
        """True when it was started here, and so holds the checkpoint's weights to begin with."""
        return self.client.server is not None

    # ---- sampling ----

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Return sampled responses, as the protocol has it."""
        bodies = self.sampling_requests(prompts, sampling)
        answers = self.client.calls(COMPLETIONS, bodies, self.batch_size, on_progress)
        samples = [self.parse_sample(body, answer) for body, answer in zip(bodies, answers, strict=True)]
        return self.build_responses(samples, sampling.n)

    def sampling_requests(self, prompts: list[list[int]], sampling: Sampling) -> list[dict[str, Any]]:
        """Return one request per response, those to one prompt one after another."""
        return [
            self.sampling_request(
                TurnRequest(index, prompts[index], sampling.max_tokens, sampling.request_seed(index, sample)),
                sampling.temperature,
                sampling.top_p,
            )
            for index in range(len(prompts))
            for sample in range(sampling.n)
        ]

    def sampling_request(self, request: TurnRequest, temperature: float, top_p: float) -> dict[str, Any]:
        """Return the body of a request for one response."""
        return {
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": request.seed,
            "stop_token_ids": [self.eos],
            "ignore_eos": True,  # only our end token stops; configs of some models name others
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # or every token is decoded once more, for a field that is not read
        }

    def build_responses(self, samples: list[tuple[list[int], list[float]]], n: int) -> list[list[Response]]:
        """Return ``n`` responses per prompt from tokens and log-probabilities in the order of the requests."""
        texts = self.tokenizer.batch_decode([tokens for tokens, _ in samples], skip_special_tokens=True)
        responses = [
            Response(tokens, logprobs, tokens[-1] == self.eos, text)
            for (tokens, logprobs), text in zip(samples, texts, strict=True)
        ]
        return [responses[start : start + n] for start in range(0, len(responses), n)]

    def parse_sample(self, body: dict[str, Any], answer: Any) -> tuple[list[int], list[float]]:
        """Return tokens and log-probabilities of an answer to ``body``. Raises ``BadReply`` for any other content."""
        choice = self._choice(body["prompt"], answer)
        tokens = self.client.find(COMPLETIONS, choice, "token_ids")
        logprobs = self.client.find(COMPLETIONS, choice, "logprobs", "token_logprobs")
        reason = self.client.find(COMPLETIONS, choice, "finish_reason")
        problem = self._token_problem(tokens, body["max_tokens"]) or _logprob_problem(logprobs, len(tokens))
        # Reason and last token must agree. Otherwise the server ends turns with another token.
        if problem is None and (reason not in ("stop", "length") or (reason == "stop") != (tokens[-1] == self.eos)):
            problem = f"it ended with '{reason}' at token {tokens[-1]}, where {self.eos} is the one that ends a turn"
        if problem is not None:
            raise self.client.unexpected(COMPLETIONS, problem, choice)
        return tokens, [float(value) for value in logprobs]

    def cached_tokens(self, answer: Any) -> int | None:
        """Return how many tokens of the prompt were in the server's cache; None if the answer does not say."""
        usage = answer.get("usage") if isinstance(answer, dict) else None
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        count = details.get("cached_tokens") if isinstance(details, dict) else None
        return count if isinstance(count, int) else None

    def _token_problem(self, tokens: Any, max_tokens: int) -> str | None:
        """Say what is wrong with ``token_ids``; None if it is right."""
        vocab_size = self.spec.vocab_size
        if not _is_list_of(tokens, int) or not 1 <= len(tokens) <= max_tokens:
            return f"token_ids is no list of 1 to {max_tokens} tokens"
        for token in tokens:
            if not 0 <= token < vocab_size:
                return f"token_ids has {token}, and there are {vocab_size} tokens"
        return None

    def _choice(self, prompt: list[int], answer: Any) -> Any:
        """Return the one choice of an answer to ``prompt``. Raises ``BadReply`` for another count or prompt."""
        choices = self.client.find(COMPLETIONS, answer, "choices")
        if not isinstance(choices, list) or len(choices) != 1:
            raise self.client.unexpected(COMPLETIONS, "choices is no list of one choice", answer)
        if self.client.find(COMPLETIONS, choices[0], "prompt_token_ids") != prompt:
            raise self.client.unexpected(COMPLETIONS, "prompt_token_ids is not the prompt that was sent", answer)
        return choices[0]

    # ---- scoring ----

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Return log-probabilities of response tokens. ``temperature`` must be 1: vLLM scores before temperature."""
        bodies = self.scoring_requests(prompts, responses, temperature)
        answers = self.client.calls(COMPLETIONS, bodies, self.batch_size)
        rows = zip(bodies, answers, prompts, strict=True)
        return [self.parse_scores(body, answer, len(prompt)) for body, answer, prompt in rows]

    def scoring_requests(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[dict[str, Any]]:
        """Return a request for the log-probabilities of each prompt and response."""
        if temperature != 1:
            raise ValueError("vLLM gives log-probabilities of given tokens at temperature 1 only")
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": True}
        return [{"prompt": row, **settings} for row in rows]

    def parse_scores(self, body: dict[str, Any], answer: Any, start: int) -> list[float]:
        """Return the log-probabilities of the tokens from position ``start`` on. Raises ``BadReply``."""
        row = body["prompt"]
        scores = self.client.find(COMPLETIONS, self._choice(row, answer), "prompt_logprobs")
        values = [
            self.client.find(COMPLETIONS, scores, position, str(row[position]), "logprob")
            for position in range(start, len(row))
        ]
        if not _is_list_of(values, float | int) or not all(map(_is_logprob, values)):
            raise self.client.unexpected(COMPLETIONS, "prompt_logprobs has no logarithms of probabilities", scores)
        return [float(value) for value in values]

    # ---- weights ----

    def load_weights(self, weights: Weights) -> None:
        """Give the server weights, in the checkpoint's shapes, through the folder, or all of them over NCCL."""
        if self.spec.pool.weights == "nccl":
            self.send_weights(weights)
            return
        version = self.folder.write(weights)
        self.read_weights(version)
        self.folder.drop_before(version)

    def send_weights(self, weights: Weights, watchdog: Watchdog | None = None) -> None:
        """Send weights over NCCL from the calling thread; the first call also joins the server's process group.

        Each tensor has the shape that the checkpoint gives its name.
        Raises ``ValueError`` before anything is sent when a tensor is missing.
        """
        spec = self.spec
        if self.sender is None:
            watchdog = watchdog or Watchdog(self.name, spec.config.timeout)
            self.sender = NcclSender(self.client, spec.device, spec.dtype, watchdog)
        stored = with_stored_names(weights, spec.model_dir, spec.tensor_names)
        self.sender.send(with_tied_head(stored, spec.tied_embeddings), set(spec.tensor_names))
        self._reset_prefix_cache()
        self.sent_versions += 1
        # Ask for the report last, so the loads of this transfer are included.
        self.held_weights = self._call_workers(NAME, version=f"{self.folder.owner}:nccl:{self.sent_versions}")

    def read_weights(self, version: int) -> None:
        """Have the server read a version from the folder.

        Raises ``BadReply`` when it cannot read the folder, or reads other tensors there than were written.
        """
        call = self.folder.announcement(version)
        name, digest = call["version"], call["digest"]
        # 1. The worker hashes the files before it loads them, and refuses other ones.
        try:
            reports = self._call_workers(LOAD, **call)
        except BadReply as error:
            raise BadReply(
                f"{error}. It was told to read new weights from {call['path']}: can it, under this very path? "
                "runtime.rollouts.weights_folder names a folder that both sides see."
            ) from None
        # 2. Every worker of a tensor-parallel server must report the new version.
        if any(report["version"] != name or report["digest"] != digest for report in reports):
            raise self.client.unexpected(RPC, f"it was told to hold {name} of digest {digest}", reports)
        self.held_weights = reports
        # 3. Keys and values in the cache are the old weights'.
        self._reset_prefix_cache()

    def check_weights(self, content: bool = False) -> None:
        """Raise ``WeightsChanged`` unless the server holds what this run gave it last, without another load since.

        ``content`` also compares the tensors that its workers can read, which lasts as long as hashing them.
        """
        if not self.held_weights:
            return  # it has no weights of the run yet
        reports = self._call_workers(REPORT, content=content)
        fields = [name for name in self.held_weights[0] if content or name != "content"]
        expected = [{name: report[name] for name in fields} for report in self.held_weights]
        if reports == expected:
            return
        # A server that has just started has no version at all.
        restarted = all(report["version"] is None for report in reports) and expected[0]["version"] is not None
        problem = "does not hold the weights that this run gave it: somebody else changed them, or uses the server too"
        if restarted:
            problem = "holds no weights of this run: it was restarted"
        raise WeightsChanged(
            f"the vLLM server at {self.client.address} {problem} (it reports {reports}; expected {expected}). Nothing "
            "sampled since its weights were last compared can be trusted. The stage ends; its last checkpoint is from "
            "before that. Let no other run or person use this server or its key, and run again.",
            restarted,
        )

    def _call_workers(self, method: str, **kwargs: Any) -> list[dict[str, Any]]:
        """Call a method of ``WeightsKeeper``, and return each worker's report. Raises ``BadReply``."""
        answer = self.client.call(RPC, {"method": method, "kwargs": kwargs})
        reports = self.client.find(RPC, answer, "results")
        if not isinstance(reports, list) or not reports or not all(map(_is_report, reports)):
            raise self.client.unexpected(RPC, "results is no list of what each worker holds", answer)
        return reports

    def _reset_prefix_cache(self) -> None:
        """Drop cached keys and values. Refused while requests hold blocks, as cancelled ones do for a while."""
        deadline = time.monotonic() + min(GRACE_SECONDS, self.client.timeout)
        while self.client.find(RESET, self.client.call(RESET), "success") is not True:
            if time.monotonic() > deadline:
                raise BadReply("vLLM kept its prefix cache across a change of weights: requests still hold blocks")
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """End a server that was started here. Any other continues with the last weights it was given."""
        if self.client.server is not None:
            self.client.server.end()

    def close(self) -> None:
        """End a server that was started here, and remove the folder of weights."""
        self.end()
        self.folder.close()


def _is_list_of(values: Any, kind: Any) -> bool:
    """Return True for a list of ``kind``. True and False, which Python counts as numbers, do not pass."""
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _logprob_problem(logprobs: Any, count: int) -> str | None:
    """Say what is wrong with ``token_logprobs``; None if it is right."""
    if not _is_list_of(logprobs, float | int) or len(logprobs) != count:
        return f"token_logprobs is no list of {count} numbers"
    for value in logprobs:
        if not _is_logprob(value):
            return f"token_logprobs has {value}, no logarithm of a probability"
    return None


def _is_logprob(value: float) -> bool:
    return math.isfinite(value) and value <= MAX_LOGPROB


def _is_report(report: Any) -> bool:
    return isinstance(report, dict) and {"version", "digest", "loads"} <= report.keys()


FAULTS = (EngineLost, BadReply, OSError)
"""Errors of one server that another server, or the same one after a restart, may not have."""
NO_WEIGHTS = -1
"""Version of a server that came back and waits for weights over NCCL."""


class Member:
    """One server of the pool."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.losses = 0
        """Times that it was lost, or failed to come back."""
        self.last_error = ""
        self.engine: ServerEngine
        self.version = 0
        """Version of the weights that it holds; 0 stands for the checkpoint's weights."""
        self.ready = False
        """True while it holds the weights that it was given last."""
        self.is_loading = False
        """True while it reads new ones during a session, and until the session has seen how that ended."""
        self.coming_back = False

    @property
    def client(self) -> Client:
        """The client that makes its calls."""
        return self.engine.client

    def read(self, version: int) -> None:
        """Have it read a version of the weights. Raises as ``ServerEngine.read_weights``."""
        self.engine.read_weights(version)
        self.version = version
