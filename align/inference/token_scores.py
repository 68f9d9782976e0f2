"""The likeliest tokens at each position of a given text, from vLLM's ``prompt_logprobs`` or a provider's completions.

Both routes are ``/completions`` and sample one token, which is ignored. vLLM gets token ids, and no temperature. A
provider gets text with ``echo`` and ``logprobs`` and returns its own tokens as text. Torch-free. Leaves out what the
tokens mean to a student (``align.training.teachers``).
"""

from __future__ import annotations

import json
from typing import Any

from align.config.endpoint import EndpointConfig
from align.inference.endpoint_client import Endpoint
from align.inference.requests import Answer, Request

Position = list[Any]
"""Start and end of a token in the text, or for vLLM its decoded text and None; then ids or texts of the likeliest
tokens, and their log-probabilities."""


MAX_LOGPROB = 1e-3
"""Largest log-probability that rounding explains."""


class ScoringEndpoint(Endpoint):
    """An endpoint that scores given texts. An answer's text is the JSON of a list of ``Position``."""

    path = "/completions"
    noun = "completion with log-probabilities of the prompt"
    max_bytes = 256 << 20

    def __init__(self, config: EndpointConfig, api: str, top_k: int, place: str) -> None:
        """``api`` is ``vllm`` or ``completions``. Raises ``UserError`` when the key's variable is not set."""
        super().__init__(config, place=place)
        self.top_k = top_k
        self.remedy = (
            f"It was asked for top_k {top_k}: providers return at most 20 (some 5), and vLLM as many as its option "
            "--max-logprobs. Its model must also know all tokens of the student and have room for the rows."
        )
        self.identity = {**self.identity, "api": api, "top_k": str(top_k)}

    def request(self, prompt: list[int] | str, start: int) -> Request:
        """Return the request for the tokens from ``start`` on, an index of token ids or of characters."""
        return Request(self.identity, [{"role": str(start), "content": json.dumps(prompt)}], max_tokens=1)

    def body(self, request: Request) -> dict[str, Any]:
        """Return the JSON of a request, without ``extra``."""
        prompt = json.loads(request.messages[0]["content"])
        body: dict[str, Any] = {"model": self.config.model, "prompt": prompt, "max_tokens": 1}
        if self.identity["api"] == "vllm":
            return body | {"prompt_logprobs": self.top_k}
        return body | {"echo": True, "logprobs": self.top_k}

    def parse(self, request: Request, reply: Any) -> Answer:
        """Return the positions in a reply's JSON. Raises ``ValueError`` for anything else."""
        message = request.messages[0]
        # ``request`` wrote the prompt as the content, and the first place to score as the role.
        prompt = json.loads(message["content"])
        start = int(message["role"])
        try:
            choice = reply["choices"][0]
            usage = reply.get("usage") or {}
            if self.identity["api"] == "vllm":
                scored = choice.get("prompt_logprobs")
                if scored is None:
                    raise ValueError("it lacks prompt_logprobs; if the server is not vLLM, write `api: completions`")
                pairs = zip(prompt[start:], scored[start:], strict=True)
                positions = [self._position_of_ids(token, entry) for token, entry in pairs]
            else:
                positions = self._positions_of_texts(prompt, start, choice["logprobs"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        counts = [count if isinstance(count, int) else None for count in tokens]
        return Answer(json.dumps(positions), prompt_tokens=counts[0], completion_tokens=counts[1])

    def _position_of_ids(self, token: int, entry: dict[str, Any]) -> Position:
        """Return the likeliest tokens of one entry of ``prompt_logprobs``: id as text → logprob, decoded_token."""
        token_entry = entry[str(token)]  # vLLM adds the given token to the likeliest
        best = _best({int(token): values["logprob"] for token, values in entry.items()}, self.top_k)
        return [token_entry.get("decoded_token"), None, *best]

    def _positions_of_texts(self, prompt: str, start: int, logprobs: dict[str, Any]) -> list[Position]:
        """Return the positions at or after the character ``start``, located by the texts of the tokens."""
        texts = [str(text) for text in logprobs["tokens"]]
        # Servers may put a BOS token before the prompt, and the sampled token follows it.
        first = "".join(texts).find(prompt)
        offsets: Any = logprobs.get("text_offset")
        if first < 0 and not offsets:
            raise ValueError("its tokens do not add up to the prompt; was `echo` ignored?")
        positions = []
        position = -first
        for index, (text, best) in enumerate(zip(texts, logprobs["top_logprobs"], strict=True)):
            # Offsets only where tokens have no text, as parts of characters at OpenAI.
            begin = position if first >= 0 else int(offsets[index])
            position = begin + len(text)
            if start <= begin and position <= len(prompt):
                positions.append([begin, position, *_best(best or {}, self.top_k)])
        return positions


def _best(logprobs: dict[Any, float], top_k: int) -> tuple[list[Any], list[float]]:
    """Return the ``top_k`` likeliest tokens and their log-probabilities, in falling order."""
    if not all(isinstance(value, float | int) and value <= MAX_LOGPROB for value in logprobs.values()):
        raise ValueError(f"{logprobs} are no logarithms of probabilities")
    pairs = sorted(((float(value), token) for token, value in logprobs.items()), key=lambda pair: -pair[0])[:top_k]
    return [token for _, token in pairs], [value for value, _ in pairs]
