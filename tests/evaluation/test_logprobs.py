"""Token log-probabilities against one plain forward pass; KL by hand."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GraniteConfig, MistralConfig, NemotronConfig

from align.evaluation import logprobs as module
from align.evaluation.drift import sequence_kl
from align.evaluation.logprobs import response_logprobs
from align.models.loading import load_policy

SMALL = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_matches_a_plain_forward_pass_whatever_the_batches(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_policy(tiny_model)
    prompts = [[5, 9, 7], [8, 4, 6, 30, 31], [20]]
    responses = [[40, 41, 2], [50], [60, 61, 62, 63, 64, 65]]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0].float() / 0.7
        table = torch.log_softmax(logits, dim=-1)
        expected.append([table[len(prompt) - 1 + index, token].item() for index, token in enumerate(response)])
    for batch_tokens in (4096, 10, 1):
        monkeypatch.setattr(module, "READ_TOKENS", batch_tokens)
        logprobs = response_logprobs(model, prompts, responses, temperature=0.7, precision="float32", pad=3)
        for got, want in zip(logprobs, expected, strict=True):
            assert got == pytest.approx(want, abs=1e-4)


SHARED = [[5, 9, 7, 30, 11]] * 4 + [[8, 4]] + [[20, 21, 22, 23]] * 3
ANSWERS = [[40, 41, 2], [50], [60, 61, 62, 63], [40], [9, 9], [31, 32], [33], []]


def alone(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    table = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    return [table[len(prompt) - 1 + index, token].item() for index, token in enumerate(response)]


def read_shared(model):
    """Return the log-probabilities of SHARED, those of each row alone, and the number of tokens read."""
    expected = [alone(model, prompt, response) for prompt, response in zip(SHARED, ANSWERS, strict=True)]
    sizes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    logprobs = response_logprobs(model, SHARED, ANSWERS, temperature=1.0, precision="float32", pad=3)
    hook.remove()
    for got, want in zip(logprobs, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    return sum(sizes)


def test_shared_prompt_is_read_once_and_answers_are_independent(tiny_model: Path, monkeypatch):
    model = load_policy(tiny_model)
    # The first prompt, 5 tokens, with 2 + 0 + 3 + 0 behind it; the third, 4, with 1 + 0; then a row of 2 + 1.
    assert read_shared(model) == (5 + 5) + (4 + 1) + 3
    # At most 7 tokens at once, in the order of the tokens: 5 + 0 + 2; 5 + 3, a row that is longer; 2 + 1 and 4; 4 + 1.
    monkeypatch.setattr(module, "READ_TOKENS", 7)
    assert read_shared(model) == 7 + 8 + 7 + 5


def test_a_shared_prompt_under_bfloat16(tiny_model: Path):
    model = load_policy(tiny_model)
    exact = response_logprobs(model, SHARED, ANSWERS, temperature=1.0, precision="float32", pad=3)
    rounded = response_logprobs(model, SHARED, ANSWERS, temperature=1.0, precision="bfloat16", pad=3)
    for got, want in zip(rounded, exact, strict=True):
        assert got == pytest.approx(want, abs=0.1)
        assert not want or got != want


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3),  # attends to a window only
        NemotronConfig(**SMALL, num_key_value_heads=2),  # keeps the layout to itself
    ],
    ids=["window", "deaf"],
)
def test_models_that_cannot_share_read_every_row(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert read_shared(model) >= sum(len(prompt) + len(answer) for prompt, answer in zip(SHARED, ANSWERS, strict=True))


def test_a_model_that_scales_its_logits_keeps_its_own_head():
    config = GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=4.0, embedding_multiplier=6.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert read_shared(model) == (5 + 5) + (4 + 1) + 3


@pytest.fixture(scope="module")
def llama(tiny_model: Path):
    return load_policy(tiny_model)


@st.composite
def prompts_and_responses(draw):
    """Prompts that begin alike, several responses to each, and pairs that are there twice."""
    ids = st.integers(4, 200)
    system = draw(st.lists(ids, min_size=1, max_size=8))
    prompts = [[*system, *tail] for tail in draw(st.lists(st.lists(ids, max_size=9), min_size=1, max_size=4))]
    responses = draw(st.lists(st.lists(ids, max_size=9), min_size=1, max_size=4))
    pairs = draw(st.lists(st.tuples(st.sampled_from(prompts), st.sampled_from(responses)), min_size=1, max_size=9))
    return [list(prompt) for prompt, _ in pairs], [list(response) for _, response in pairs]


@given(prompts_and_responses(), st.sampled_from([1, 12, 40, 2048]), st.sampled_from([0.7, 1.0]))
@settings(max_examples=40, deadline=None)
def test_values_are_those_of_each_row_alone(llama, rows, batch_tokens, temperature):
    prompts, responses = rows
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        table = torch.log_softmax(llama(torch.tensor([[*prompt, *response]])).logits[0] / temperature, dim=-1)
        expected.append([table[len(prompt) - 1 + index, token].item() for index, token in enumerate(response)])
    progress: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_TOKENS", batch_tokens)
        logprobs = response_logprobs(
            llama, prompts, responses, temperature=temperature, precision="float32", pad=3,
            on_progress=lambda done, total: progress.append((done, total)),
        )  # fmt: skip
    for got, want in zip(logprobs, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    assert progress[-1] == (len(prompts), len(prompts))
    for first, pair in enumerate(zip(prompts, responses, strict=True)):
        second = next(i for i, other in enumerate(zip(prompts, responses, strict=True)) if other == pair)
        assert logprobs[first] == logprobs[second]


def test_kl_by_hand():
    # p = (0.5, 0.25), q = (0.25, 0.5): log ratios log 2 and -log 2
    k1, k3 = sequence_kl([math.log(0.5), math.log(0.25)], [math.log(0.25), math.log(0.5)])
    assert k1 == pytest.approx(0)
    # (0.5 - 1 + log 2) + (2 - 1 - log 2)
    assert k3 == pytest.approx(0.5)


def test_kl_of_a_policy_to_itself_is_zero():
    assert sequence_kl([-1.0, -2.0], [-1.0, -2.0]) == (0, 0)


def test_k1_estimates_the_true_kl():
    torch.manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    picks = torch.multinomial(p, 20_000, replacement=True)
    k1, k3 = zip(*(sequence_kl([p[i].log().item()], [q[i].log().item()]) for i in picks), strict=True)
    truth = (p * (p / q).log()).sum().item()
    assert sum(k1) / len(k1) == pytest.approx(truth, abs=0.02)
    assert sum(k3) / len(k3) == pytest.approx(truth, abs=0.02)
    assert min(k3) >= 0
