"""Rollouts by transformers: slower than vLLM, but on every device and without installation.

Prompts of similar length are decoded together, left-padded, with a key-value cache. Finished rows leave the batch once
a quarter of it has ended, so the long tail costs little. Each response has its own generator, seeded from its
index: its randomness does not depend on the batch. Leaves out prefix sharing and continuous batching.

Cheap sampling of tokens: one uniform number per row, and a search in the cumulative distribution.

The usual way, an exponential random number per vocabulary entry, costs 40 of SmolLM2's 130 ms per decoding step on two
cores. The distribution is the same. Leaves out top-k, min-p and penalties, which would make the sampler's
log-probabilities differ from the trainer's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from align.errors import UserError
from align.inference.protocol import Progress, Response, Sampling, TurnRequest, Watchdog
from align.inference.weights import HeldBase, Weights
from align.models.compute.processes import cumulative_sum, trim_malloc
from align.models.experts import has_experts, token_experts
from align.models.loading import load_policy, load_tokenizer
from align.models.pretrained import with_tensors


class TransformersEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around one causal model."""

    name = "transformers"

    def __init__(
        self,
        model_dir: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.watchdog = watchdog or Watchdog(self.name)
        self.tokenizer = load_tokenizer(model_dir)
        with self.watchdog.watch("start"):
            self.model = load_policy(model_dir, dtype).to(device).requires_grad_(False)
        require_cache(self.model, str(model_dir), "Sample with vLLM instead: `runtime: {engine: {name: vllm}}`.")
        # ``logits_to_keep`` hands the head a slice, for which torch's CPU product copies the head once a sequence.
        self.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.eos = int(self.tokenizer.eos_token_id)
        self.pad = int(self.tokenizer.pad_token_id)
        self.held = HeldBase()

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Return sampled responses, as the protocol has it."""
        jobs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(sampling.n)]
        requests = [
            TurnRequest(number, prompts[prompt], sampling.max_tokens, sampling.request_seed(prompt, sample))
            for number, (prompt, sample) in enumerate(jobs)
        ]
        responses = self.sample(requests, sampling.temperature, sampling.top_p, on_progress)
        return [responses[index * sampling.n : (index + 1) * sampling.n] for index in range(len(prompts))]

    def sample(
        self,
        requests: list[TurnRequest],
        temperature: float,
        top_p: float,
        on_progress: Progress | None = None,
    ) -> list[Response]:
        """Return the responses to ``requests``, in their order; each has its own seed and limit."""
        # Longest first: a batch that does not fit in memory fails at once, not after an hour.
        order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt), index))
        by_request: dict[int, Response] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            with self.watchdog.watch("generate"):
                decoded = self._decode([requests[index] for index in batch], temperature, top_p)
            by_request.update(zip(batch, decoded, strict=True))
            if on_progress is not None:
                on_progress(len(by_request), len(requests))
        return [by_request[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _decode(self, requests: list[TurnRequest], temperature: float, top_p: float) -> list[Response]:
        """Decode one batch of B requests from the first token to the last."""
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        ids, mask = self._left_pad([request.prompt for request in requests])  # (B, P)
        # Padding on the left needs no positions: the first real token of every prompt is at 0.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        rows = list(range(len(requests)))  # index of the response that each row of the cache belongs to
        cache = None
        while True:
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            # 1. Sample a token for every row, with its response's own generator.
            scores = processed_logprobs(out.logits[:, -1].float(), temperature, top_p)  # (B, V)
            uniform = torch.stack([torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows])
            picked = pick_tokens(scores, uniform.to(self.device), greedy=temperature == 0)  # (B,)
            values = scores.gather(1, picked[:, None])[:, 0].tolist()
            # 2. Append it, unless the row is done and is only waiting to leave the batch.
            for row, token, value in zip(rows, picked.tolist(), values, strict=True):
                if not self._is_done(tokens[row], requests[row]):
                    tokens[row].append(token)
                    logprobs[row].append(value)
            self.watchdog.progress()
            alive = [index for index, row in enumerate(rows) if not self._is_done(tokens[row], requests[row])]
            if not alive:
                break
            # 3. Drop the others from the cache, once they are a quarter of the batch.
            keep = torch.arange(len(rows), device=self.device)
            if len(alive) <= 0.75 * len(rows):
                keep = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(keep)
                rows = [rows[index] for index in alive]
            ids = picked[keep, None]
            mask = torch.cat([mask[keep], mask.new_ones(len(keep), 1)], dim=1)
            positions = positions[keep, -1:] + 1
        return [self._response(*pair) for pair in zip(tokens, logprobs, strict=True)]

    def _is_done(self, tokens: list[int], request: TurnRequest) -> bool:
        return self._ended(tokens) or len(tokens) >= request.max_tokens

    def _ended(self, tokens: list[int]) -> bool:
        return bool(tokens) and tokens[-1] == self.eos

    def _response(self, tokens: list[int], logprobs: list[float]) -> Response:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Response(tokens, logprobs, self._ended(tokens), text)

    def _left_pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, each (B, P), with padding on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return ids.to(self.device), mask.to(self.device)

    def token_experts(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Return the experts of each row's tokens, (L, T, k) for L layers; the model is a mixture of experts."""
        return token_experts(self.model, rows)

    def load_weights(self, weights: Weights) -> None:
        """Copy a full set of weights into the model, so further training does not change the sampler halfway.

        Names are the model's own, or those of its files, which store each expert of a mixture. A tied tensor may be
        missing: its memory is another tensor's, which was copied.
        """
        state = self.model.state_dict()
        names_by_address: dict[int, set[str]] = {}
        for name, tensor in state.items():
            names_by_address.setdefault(tensor.data_ptr(), set()).add(name)
        with self.watchdog.watch("load_weights"), self.held.loading(weights) as needed:
            missing = set(state) if needed is weights else set()
            for name, tensor in self._by_own_names(needed):
                if name not in state:
                    raise ValueError(f"the engine's model has no weight '{name}'")
                state[name].copy_(tensor)
                missing.discard(name)
                self.watchdog.progress()
            # Tied tensors share an address, so a single name is enough.
            lacking = sorted(name for name in missing if len(names_by_address[state[name].data_ptr()]) == 1)
            if lacking:
                raise ValueError(f"the new weights lack {', '.join(lacking[:3])}: a full set is needed")

    def _by_own_names(self, weights: Weights) -> Weights:
        """Return the weights by the model's names; only those of a mixture's files are read before they are copied."""
        if not has_experts(self.model.config):
            return weights
        tensors = dict(weights)
        if tensors.keys() <= self.model.state_dict().keys():
            return tensors.items()
        tensors_by_name: dict[str, torch.Tensor] = with_tensors(self.model, tensors).state_dict()
        return tensors_by_name.items()

    @torch.inference_mode()
    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Return log-probabilities of response tokens, as the protocol has it."""
        with self.watchdog.watch("score_tokens"):
            return [self._score(*pair, temperature) for pair in zip(prompts, responses, strict=True)]

    def _score(self, prompt: list[int], response: list[int], temperature: float) -> list[float]:
        ids = torch.tensor([[*prompt, *response]], device=self.device)
        logits = self.model(input_ids=ids, logits_to_keep=len(response) + 1).logits[0, :-1].float()  # (T, V)
        scores = processed_logprobs(logits, temperature, 1.0)
        logprobs: list[float] = scores.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
        self.watchdog.progress()
        return logprobs

    def close(self) -> None:
        """Free the model."""
        self.model = None
        trim_malloc()  # what a reward model or a checkpoint that is read needs next would come on top of it


class LiveEngine(TransformersEngine):
    """Samples from a model that is being trained: it has no copy, so there are no weights to load."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, batch_size: int, watchdog: Watchdog) -> None:
        require_cache(model, "evaluate", "Use tasks that read, such as multiple_choice.")
        self.watchdog = watchdog
        self.tokenizer = tokenizer
        self.model = model
        weight = next(model.parameters())
        self.device = weight.device
        self.dtype = weight.dtype
        self.batch_size = batch_size
        self.eos = int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id)


def require_cache(model: PreTrainedModel, place: str, remedy: str) -> None:
    """Raise ``UserError`` for a model without a cache of keys and values."""
    if not hasattr(model.config.get_text_config(), "num_attention_heads"):
        raise UserError(
            f"{place}: {model.config.model_type} has no cache of keys and values, with which transformers samples "
            f"here. {remedy}"
        )


BLOCK = 256
"""Vocabulary entries per block of the two-level search."""


def processed_logprobs(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return the log-probabilities that are sampled from, (B, V) float32: after temperature and nucleus cut.

    ``logits`` is (B, V). Temperature 0 (greedy) leaves the logits' own scale. ``top_p`` keeps the smallest set of
    tokens whose probability reaches it (arXiv 1904.09751) and renormalizes over it; the rest is ``-inf``.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # The mass ahead of each token; the first token always stays.
        before = cumulative_sum(probabilities, dim=-1) - probabilities
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(cut, float("-inf"))
    return logits.log_softmax(dim=-1)


def pick_tokens(logprobs: torch.Tensor, uniform: torch.Tensor, greedy: bool = False) -> torch.Tensor:
    """Return token ids (B,), sampled by inverting the cumulative distribution at ``uniform``, (B,) in [0, 1).

    ``logprobs`` is (B, V). The search has two levels, blocks and entries of one block, so only block sums are
    accumulated over the vocabulary, in float64: a token without probability is never sampled. Converting all entries to
    float64 first took a tenth of a decode step on two cores.
    """
    if greedy:
        return logprobs.argmax(dim=-1)
    rows, width = logprobs.shape
    probabilities = logprobs.exp()
    if width % BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, BLOCK - width % BLOCK))
    blocks = probabilities.view(rows, -1, BLOCK)
    # 1. Find the block in which the cumulative sum passes the target.
    totals = cumulative_sum(blocks.sum(dim=2).to(torch.float64), dim=1)  # (B, V / BLOCK)
    target = uniform.to(torch.float64)[:, None] * totals[:, -1:]  # scaled by the sum, which is 1 up to rounding
    block = _first_above(totals, target)  # (B, 1)
    # 2. Find the entry within it. The bound keeps rounding from stepping past its last entry.
    before = torch.where(block > 0, totals.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(target))
    entries = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].to(torch.float64)  # (B, BLOCK)
    inside = cumulative_sum(entries, dim=1)
    offset = _first_above(inside, torch.minimum(target - before, inside[:, -1:] * (1 - 1e-12)))
    return (block * BLOCK + offset)[:, 0]


def _first_above(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the index (B, 1) of the first of the cumulative sums (B, N) that exceeds ``target``, (B, 1)."""
    return (sums <= target).sum(dim=1, keepdim=True).clamp(max=sums.shape[1] - 1)
