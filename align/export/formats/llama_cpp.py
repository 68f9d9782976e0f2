"""A GGUF file in llama.cpp, through the package ``llama-cpp-python``, which is optional.

Its tokenizer, its tokens that end an answer and its logits show what no other reader of the file can: how llama.cpp
understands it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from align.export.formats.gguf_tensors import Array

PACKAGE = "llama_cpp"


def is_installed() -> bool:
    """Return whether llama-cpp-python can be imported."""
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp:
    """A GGUF file opened in llama.cpp."""

    def __init__(self, file: Path, context: int, is_exact: bool = False) -> None:
        """Load ``file`` for sequences of ``context`` tokens; with ``is_exact``, keys and values stay float32."""
        import llama_cpp

        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if is_exact else {}
        self._library: Any = llama_cpp
        self._model: Any = llama_cpp.Llama(
            str(file), n_ctx=context, n_batch=context, logits_all=True, verbose=False, **cache
        )
        self.version = f"llama.cpp ({llama_cpp.__version__})"

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text with special tokens in it, without a token at the beginning."""
        return list(self._model.tokenize(text.encode(), add_bos=False, special=True))

    def is_end(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        vocabulary = self._library.llama_model_get_vocab(self._model.model)
        return bool(self._library.llama_vocab_is_eog(vocabulary, token))

    def logits(self, tokens: Sequence[int]) -> Array:
        """Return the logits behind each token, (tokens, vocabulary)."""
        self._model.reset()
        self._model.eval(list(tokens))
        return np.array(self._model.scores[: len(tokens)])

    def answer(self, prompt: Sequence[int], most: int) -> list[int]:
        """Return the greedy answer to a prompt, with the token that ends it."""
        self._model.reset()
        answer: list[int] = []
        waiting = list(prompt)
        while len(answer) < most:
            self._model.eval(waiting)
            token = int(self._model.scores[self._model.n_tokens - 1].argmax())
            answer.append(token)
            if self.is_end(token):
                break
            waiting = [token]
        return answer
