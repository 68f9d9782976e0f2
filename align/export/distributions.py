"""Distributions of a model at each token of given answers, compared with a checkpoint's: KL, greedy tokens, perplexity.

Runs in the process of a job (``align.export.answers``). transformers and llama.cpp compute whole distributions. vLLM
returns the most probable token and the given token's log-probability at each position, so it has no KL.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import StageFailed
from align.export.answers import (
    Job,
    JobResult,
    answer_rows,
    compute_device,
    engine_version,
    vllm_options,
)
from align.export.export import Source, load_source, round_activations

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def measure_distributions(job: Job) -> JobResult:
    """Compute the distributions of a model for ``Job.output``, or compare them with those in that file.

    Without ``responses``, the model answers greedily first. Rows are computed one at a time, without padding.
    """
    if job.engine == "llama.cpp":
        return _in_llama_cpp(job)
    if job.engine == "vllm":
        return _in_vllm(job)
    import torch

    result = JobResult()
    if not job.responses:
        result = answer_rows(job)
        job = replace(job, responses=result.tokens)
    if job.tasks:
        answered = answer_rows(replace(job, rows=job.tasks, responses=[], max_tokens=job.task_tokens))
        result = replace(result, task_answers=answered.tokens)
    model = load_source(Source(Path(job.folder), None if job.adapter is None else Path(job.adapter)))
    model = model.to(compute_device()).requires_grad_(False)
    if job.activations is not None:
        round_activations(model, job.activations)

    def logits(row: list[int]) -> Array:
        with torch.inference_mode():
            values: Array = model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu().numpy()
        return values

    return _compare(job, logits, replace(result, version=engine_version(job.engine)))


def _in_llama_cpp(job: Job) -> JobResult:
    """Compare llama.cpp's tokens and distributions. Raises ``StageFailed`` for other tokens or ends."""
    longest = max(len(row) + len(answer) for row, answer in zip(job.rows, job.responses, strict=True))
    most = max(job.max_tokens, job.task_tokens)
    model = LlamaCpp(Path(job.folder), max([longest, *map(len, (*job.texts, *job.tasks))]) + most)
    for number, (prompt, row) in enumerate(zip(job.prompts, job.rows, strict=True), start=1):
        if model.tokenize(prompt) != row:
            raise StageFailed(f"llama.cpp reads question {number} as other tokens than the checkpoint's tokenizer.")
    for token in job.ends:
        if not model.is_end(token):
            raise StageFailed(f"llama.cpp does not end an answer at token {token}.")
    started = time.monotonic()
    tokens = [model.answer(row, job.max_tokens) for row in job.rows]
    result = JobResult(model.version, tokens, seconds=time.monotonic() - started)
    answers = [model.answer(row, job.task_tokens) for row in job.tasks]
    return _compare(job, model.logits, replace(result, task_answers=answers))


def _in_vllm(job: Job) -> JobResult:
    """Compare vLLM's most probable tokens with ``responses``, which are the checkpoint's."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    rows = [[*row, *answer] for row, answer in zip(job.rows, job.responses, strict=True)]
    longest = max(map(len, (*rows, *job.texts, *job.tasks))) + max(job.max_tokens, job.task_tokens)
    llm = LLM(model=job.folder, trust_remote_code=False, **vllm_options(longest, len(rows), job.dtype))
    prompts = [TokensPrompt(prompt_token_ids=row) for row in job.rows]
    greedy = SamplingParams(temperature=0.0, max_tokens=job.max_tokens)
    llm.generate(prompts[:1], greedy, use_tqdm=False)  # the first call warms up
    started = time.monotonic()
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    seconds = time.monotonic() - started
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    task_answers = []
    if job.tasks:
        greedy = SamplingParams(temperature=0.0, max_tokens=job.task_tokens)
        answered = llm.generate([TokensPrompt(prompt_token_ids=row) for row in job.tasks], greedy, use_tqdm=False)
        task_answers = [list(output.outputs[0].token_ids) for output in answered]
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    given = llm.generate([TokensPrompt(prompt_token_ids=row) for row in (*rows, *job.texts)], scored, use_tqdm=False)
    same = 0
    for row, answer, output in zip(job.rows, job.responses, given, strict=False):
        places: Any = output.prompt_logprobs
        same += sum(places[len(row) + index][token].rank == 1 for index, token in enumerate(answer))
    text_logprobs = []
    for text, output in zip(job.texts, given[len(rows) :], strict=True):
        places = output.prompt_logprobs
        text_logprobs += [float(places[index][token].logprob) for index, token in enumerate(text) if index > 0]
    version = f"{engine_version('vllm')} ({job.dtype})"
    return JobResult(
        version, tokens, same=same, text_logprobs=text_logprobs, seconds=seconds, task_answers=task_answers
    )


def _compare(job: Job, logits: Callable[[list[int]], Array], result: JobResult) -> JobResult:
    """Return the result with the divergence from ``Job.output``, or write that file."""
    rows = []
    for row, answer in zip(job.rows, job.responses, strict=True):
        # Position t has the logits of token t + 1.
        rows.append(_log_softmax(logits([*row, *answer])[len(row) - 1 : -1]))
    own = np.concatenate(rows)
    text_logprobs = []
    for text in job.texts:
        scores = _log_softmax(logits(text)[:-1])
        text_logprobs += [float(score) for score in scores[np.arange(len(text) - 1), text[1:]]]
    result = replace(result, text_logprobs=text_logprobs)
    if job.output is None:
        return result
    if not Path(job.output).is_file():
        np.save(job.output, own)
        return result
    expected = np.load(job.output)
    kl = (np.exp(expected) * (expected - own)).sum(axis=1)
    same = int((expected.argmax(axis=1) == own.argmax(axis=1)).sum())
    return replace(result, kl=[float(value) for value in kl], same=same)


def _log_softmax(logits: Array) -> Array:
    # Sums over a vocabulary need more digits than float32 has.
    values = logits.astype(np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    scores: Array = (values - np.log(np.exp(values).sum(axis=-1, keepdims=True))).astype(np.float32)
    return scores


def has_llama_cpp() -> bool:
    """Return whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF file opened in llama.cpp.

    Its tokenizer, its tokens that end an answer and its logits show what no other reader of the file can: how llama.cpp
    understands it.
    """

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
