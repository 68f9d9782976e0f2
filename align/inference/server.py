"""One vLLM server: what it is asked, what its answers must hold, how it takes new weights.

With ``server_process.py``, ``server_options.py``, ``server_worker.py`` and ``nccl.py`` all that touches vLLM's HTTP
interface: routes, fields and options as of 0.31 (``/v1/completions``, ``/collective_rpc``, ``/reset_prefix_cache``,
``/server_info``, ``/health``), the middle three of which exist only with ``VLLM_SERVER_DEV_MODE=1``. Every call ends
within ``runtime.engine.timeout``, with an answer or an error that says whether the server lives. Left out: asking
again, and several servers (``pool.py``); streaming, tokens scored at other temperatures.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch

from align.inference import nccl
from align.inference.protocol import Progress, Response, Sampling
from align.inference.server_client import POLL_SECONDS, BadReply, Client, WeightsChanged
from align.inference.server_options import Served, key_of, refuse_unfit
from align.inference.server_process import GRACE_SECONDS, Place, start_server
from align.inference.server_worker import LOAD, NAME, TELL
from align.inference.watchdog import Watchdog
from align.inference.weights import checkpoint_weights, with_tied_head
from align.inference.weights_folder import WeightsFolder

COMPLETIONS, RPC, RESET = "/v1/completions", "/collective_rpc", "/reset_prefix_cache"
MOST_LOGPROB = 1e-3
"""A logarithm of a probability is at most 0, but for the rounding of float32."""


class ServerEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around one vLLM server, started here or running already."""

    name = "vllm-server"
    sender: nccl.NcclSender | None = None

    def __init__(
        self,
        served: Served,
        folder: WeightsFolder,
        number: int = 0,
        given_up: threading.Event | None = None,
    ) -> None:
        """Start server ``number`` of the pool, with the weights of ``served.model_dir``, or meet the one at its address
        there, which holds whatever it was given last.

        Raises ``UserError`` when that one is unfit, ``EngineLost`` when none starts, or ``given_up`` is set meanwhile.
        """
        self.served, self.folder, self.number = served, folder, number
        self.dtype, self.batch_size = served.dtype, served.config.batch_size
        self.tokenizer, self.eos = served.tokenizer, served.eos
        pool, timeout = served.pool, served.config.timeout
        self.holding: list[dict[str, Any]] = []
        """What each of its workers said that it holds, when it was started or given weights last."""
        self.sent = 0
        """Versions that went over NCCL."""
        if not pool.addresses:
            place = Place.of(served.pool, number, served.device.type)
            self.client = start_server(
                served.model_dir, served.options(), served.seed, timeout, [folder.temporary(), folder.path], place,
                given_up,
            )  # fmt: skip
            try:
                self.holding = self._tell(TELL, content=True)
            except BaseException:
                self.end()
                raise
        else:
            self.client = Client(pool.addresses[number], timeout, key_of(pool))
            refuse_unfit(self.client, served)

    @property
    def own(self) -> bool:
        """Whether it was started here, and holds the checkpoint's weights to begin with."""
        return self.client.server is not None

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """See the protocol."""
        bodies = self.questions(prompts, sampling)
        answers = self.client.calls(COMPLETIONS, bodies, self.batch_size, on_progress)
        found = [self.sampled(body, answer) for body, answer in zip(bodies, answers, strict=True)]
        return self.responses(found, sampling.n)

    def questions(self, prompts: list[list[int]], sampling: Sampling) -> list[dict[str, Any]]:
        """A request for each response, those to one prompt behind each other."""
        return [
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
            for index in range(len(prompts))
            for sample in range(sampling.n)
        ]

    def responses(self, found: list[tuple[list[int], list[float]]], each: int) -> list[list[Response]]:
        """``each`` responses to a prompt, from their tokens and log-probabilities in the order of ``questions``."""
        texts = self.tokenizer.batch_decode([tokens for tokens, _ in found], skip_special_tokens=True)
        made = [
            Response(tokens, logprobs, tokens[-1] == self.eos, text)
            for (tokens, logprobs), text in zip(found, texts, strict=True)
        ]
        return [made[start : start + each] for start in range(0, len(made), each)]

    def sampled(self, body: dict[str, Any], answer: Any) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities of an answer that holds exactly what ``body`` asked for. Raises ``BadReply``."""
        choice = self._choice(body["prompt"], answer)
        tokens = self.client.find(COMPLETIONS, choice, "token_ids")
        logprobs = self.client.find(COMPLETIONS, choice, "logprobs", "token_logprobs")
        reason = self.client.find(COMPLETIONS, choice, "finish_reason")
        wrong = None
        most = self.served.vocabulary
        if not _all(tokens, int) or not 1 <= len(tokens) <= body["max_tokens"]:
            wrong = f"token_ids is no list of 1 to {body['max_tokens']} tokens"
        elif not all(0 <= token < most for token in tokens):
            wrong = f"token_ids has {next(t for t in tokens if not 0 <= t < most)}, and there are {most} tokens"
        elif not _all(logprobs, float | int) or len(logprobs) != len(tokens):
            wrong = f"token_logprobs is no list of {len(tokens)} numbers"
        elif not all(_is_logprob(value) for value in logprobs):
            value = next(value for value in logprobs if not _is_logprob(value))
            wrong = f"token_logprobs has {value}, no logarithm of a probability"
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
        """See the protocol."""
        if self.served.pool.weights == "nccl":
            self.send_weights(weights)
            return
        version = self.folder.write(weights)
        self.read_weights(version)
        self.folder.drop_before(version)

    def load_checkpoint(self) -> None:
        """The weights of the checkpoint that the pool was opened with: what a server of somebody else's needs first."""
        self.load_weights(checkpoint_weights(self.served.model_dir))

    def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], watchdog: Watchdog | None = None) -> None:
        """Give it weights over NCCL, from the calling thread, which meets it first where it has not yet.

        ``ValueError`` when a tensor is missing, and then nothing is sent.
        """
        served = self.served
        if self.sender is None:
            watched = watchdog or Watchdog(self.name, served.config.timeout)
            self.sender = nccl.NcclSender(self.client, served.device, served.dtype, watched)
        self.sender.send(with_tied_head(weights, self.served.tied), set(self.served.names))
        self._forget_prefixes()
        self.sent += 1
        self.holding = self._tell(NAME, version=f"{self.folder.owner}:nccl:{self.sent}")

    def read_weights(self, version: int) -> None:
        """Have it read a version from the folder. ``BadReply`` when it cannot read the folder, or what lies there."""
        folder = self.folder.of(version)
        name, digest = self.folder.name_of(version), self.folder.digests[version]
        try:
            held = self._tell(LOAD, path=str(folder), version=name, digest=digest)
        except BadReply as error:
            raise BadReply(
                f"{error}. It was told to read new weights from {folder}: can it, under this very path? "
                "runtime.rollouts.weights_folder names a folder that both sides see."
            ) from None
        if any(worker["version"] != name or worker["digest"] != digest for worker in held):
            raise self.client.unexpected(RPC, f"it was told to hold {name} of digest {digest}", held)
        self.holding = held
        self._forget_prefixes()

    def check_weights(self, content: bool = False) -> None:
        """Raise ``WeightsChanged`` unless the server holds what this run gave it last, and nothing was loaded since.

        ``content`` compares the tensors that its workers can read, too, which takes as long as hashing them.
        """
        if not self.holding:
            return  # nothing was given to it yet
        told = self._tell(TELL, content=content)
        names = [name for name in self.holding[0] if content or name != "content"]
        expected = [{name: worker[name] for name in names} for worker in self.holding]
        if told == expected:
            return
        restarted = all(worker["version"] is None for worker in told) and expected[0]["version"] is not None
        what = (
            "holds no weights of this run: it was started anew" if restarted else
            "does not hold the weights that this run gave it: somebody else changed them, or uses the server too"
        )  # fmt: skip
        raise WeightsChanged(
            f"the vLLM server at {self.client.address} {what} (it tells {told}; expected {expected}). What was sampled "
            "since its weights were last compared cannot be trusted: the stage ends, and its last checkpoint is from "
            "before that. Let no other run or person have this server or its key, and run again.",
            restarted,
        )

    def _tell(self, method: str, **kwargs: Any) -> list[dict[str, Any]]:
        """What each worker says of its weights. Raises ``BadReply``."""
        answer = self.client.call(RPC, {"method": method, "kwargs": kwargs})
        results = self.client.find(RPC, answer, "results")
        if not isinstance(results, list) or not results or not all(map(_tells_weights, results)):
            raise self.client.unexpected(RPC, "results is no list of what each worker holds", answer)
        return results

    def _forget_prefixes(self) -> None:
        """Drop the old weights' keys and values. Refused while requests hold blocks: given-up ones do, for a while."""
        deadline = time.monotonic() + min(GRACE_SECONDS, self.client.timeout)
        while self.client.find(RESET, self.client.call(RESET), "success") is not True:
            if time.monotonic() > deadline:
                raise BadReply("vLLM kept its prefix cache across a change of weights: requests still hold blocks")
            time.sleep(POLL_SECONDS)

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """See the protocol. ``temperature`` must be 1: vLLM scores given tokens before temperature."""
        bodies = self.scoring(prompts, responses, temperature)
        answers = self.client.calls(COMPLETIONS, bodies, self.batch_size)
        found = zip(bodies, answers, prompts, strict=True)
        return [self.scored(body, answer, len(prompt)) for body, answer, prompt in found]

    def scoring(self, prompts: list[list[int]], responses: list[list[int]], temperature: float) -> list[dict[str, Any]]:
        """A request for the log-probabilities of each prompt and response."""
        if temperature != 1:
            raise ValueError("vLLM gives log-probabilities of given tokens at temperature 1 only")
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": True}
        return [{"prompt": row, **settings} for row in rows]

    def scored(self, body: dict[str, Any], answer: Any, start: int) -> list[float]:
        """Log-probabilities of the tokens from place ``start`` on. Raises ``BadReply``."""
        row = body["prompt"]
        given = self.client.find(COMPLETIONS, self._choice(row, answer), "prompt_logprobs")
        places = range(start, len(row))
        values = [self.client.find(COMPLETIONS, given, at, str(row[at]), "logprob") for at in places]
        if not _all(values, float | int) or not all(map(_is_logprob, values)):
            raise self.client.unexpected(COMPLETIONS, "prompt_logprobs has no logarithms of probabilities", given)
        return [float(value) for value in values]

    def end(self) -> None:
        """End a server that was started here; another goes on, with the last weights it was given."""
        if self.client.server is not None:
            self.client.server.end()

    def close(self) -> None:
        """See the protocol."""
        self.end()
        self.folder.close()


def _all(values: Any, kind: Any) -> bool:
    """Whether it is a list of these; true and false, which Python counts as numbers, are none."""
    return isinstance(values, list) and all(isinstance(value, kind) and value is not True and value is not False
                                            for value in values)  # fmt: skip


def _is_logprob(value: float) -> bool:
    return math.isfinite(value) and value <= MOST_LOGPROB


def _tells_weights(worker: Any) -> bool:
    return isinstance(worker, dict) and {"version", "digest", "loads"} <= worker.keys()
