"""The transformers engine: its log-probabilities are the model's, its samples do not depend on the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.errors import UserError
from align.inference.protocol import Sampling
from align.inference.trainer_engine import trainer_logprobs
from align.inference.transformers import TransformersEngine
from align.inference.weights import checkpoint_weights
from align.models.loading import load_policy
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.families import write_family

PROMPTS = [[1, 30, 31], [1, 40, 41, 42, 43, 44, 45], [1, 50], [1, 60, 61, 62]]


def _engine(model_dir: Path, batch_size: int = 64) -> TransformersEngine:
    return TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=batch_size)


def _noisy(tiny_model: Path) -> torch.nn.Module:
    model = load_policy(tiny_model)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_despite_padding(tiny_model: Path, temperature: float) -> None:
    engine = _engine(tiny_model)
    responses = engine.generate(PROMPTS, Sampling(24, temperature=temperature, n=2, seed=4))
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    flat = [response for some in responses for response in some]
    ours = trainer_logprobs(load_policy(tiny_model), prompts, [entry.token_ids for entry in flat], temperature)
    theirs = torch.tensor([value for entry in flat for value in entry.logprobs])
    assert torch.allclose(ours, theirs, atol=1e-5)
    scored = engine.score_tokens(prompts, [entry.token_ids for entry in flat], temperature)
    assert torch.allclose(torch.tensor([value for some in scored for value in some]), theirs, atol=1e-5)


def test_samples_do_not_depend_on_the_batch(tiny_model: Path) -> None:
    sampling = Sampling(24, n=3, seed=9)
    together, alone = (_engine(tiny_model, size).generate(PROMPTS, sampling) for size in (64, 1))
    assert [[entry.token_ids for entry in some] for some in together] == [
        [entry.token_ids for entry in some] for some in alone
    ]
    assert len({tuple(entry.token_ids) for entry in together[0]}) == 3
    again = _engine(tiny_model).generate(PROMPTS, Sampling(24, n=3, seed=10))
    assert again[0][0].token_ids != together[0][0].token_ids


def test_ends_at_eos_and_says_whether_it_did(tiny_model: Path) -> None:
    engine = _engine(tiny_model)
    engine.eos = 100  # any common token: a random model rarely says the real one
    responses = [entry for some in engine.generate(PROMPTS * 8, Sampling(60, seed=1)) for entry in some]
    finished = [entry for entry in responses if entry.finished]
    assert finished
    assert len(finished) < len(responses)
    for entry in responses:
        assert len(entry.token_ids) == len(entry.logprobs) <= 60
        assert entry.finished == (entry.token_ids[-1] == 100)
        assert 100 not in entry.token_ids[:-1]
        assert entry.finished or len(entry.token_ids) == 60


def test_greedy_is_the_argmax(tiny_model: Path) -> None:
    token_ids = _engine(tiny_model).generate(PROMPTS[:1], Sampling(6, temperature=0))[0][0].token_ids
    model, ids = load_policy(tiny_model), list(PROMPTS[0])
    for token in token_ids:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_weights_are_copied_and_a_missing_one_is_an_error(tiny_model: Path) -> None:
    engine, model = _engine(tiny_model), _noisy(tiny_model)
    engine.load_weights(merged_weights(model))
    before = engine.score_tokens([[1, 30]], [[40, 41]], 1.0)
    assert torch.allclose(torch.tensor(before[0]), trainer_logprobs(model, [[1, 30]], [[40, 41]], 1.0), atol=1e-5)
    model.model.norm.weight.data.zero_()
    assert engine.score_tokens([[1, 30]], [[40, 41]], 1.0) == before
    untied = [(name, tensor) for name, tensor in merged_weights(model) if name != "lm_head.weight"]
    engine.load_weights(untied)  # the tied head comes with the embeddings
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight"):
        engine.load_weights([pair for pair in untied if pair[0] != "model.norm.weight"])


def test_experts_are_loaded_by_the_names_of_their_files(tmp_path: Path) -> None:
    """Evaluation gives its engine another checkpoint's tensors, with one for each expert."""
    first, second = write_family("qwen3_moe", tmp_path / "first"), tmp_path / "second"
    other = _noisy(first)
    other.save_pretrained(second)
    engine = _engine(first)
    engine.load_weights(checkpoint_weights(second))
    responses = [[50, 51, 52]] * len(PROMPTS)
    ours = trainer_logprobs(other, PROMPTS, responses, 1.0)
    theirs = torch.tensor(engine.score_tokens(PROMPTS, responses, 1.0)).flatten()
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_progress_and_global_randomness(tiny_model: Path) -> None:
    calls: list[tuple[int, int]] = []
    torch.manual_seed(2)
    before = torch.get_rng_state()
    _engine(tiny_model, 3).generate(PROMPTS, Sampling(4, n=2), lambda done, total: calls.append((done, total)))
    assert calls == [(3, 8), (6, 8), (8, 8)]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_head_is_given_what_its_product_needs_no_copy_for(tiny_model: Path) -> None:
    # a slice of the hidden states makes torch's CPU product copy the head, once for each sequence
    engine = TransformersEngine(tiny_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=4)
    values = []
    engine.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: values.append(inputs[0]))
    engine.generate([[5, 6, 7], [8]], Sampling(max_tokens=2))
    assert values and all(inputs.is_contiguous() for inputs in values)


def test_model_without_a_cache_is_refused(tmp_path: Path) -> None:
    folder = write_family("mamba2", tmp_path)
    with pytest.raises(UserError, match="mamba2 has no cache of keys and values"):
        TransformersEngine(folder, device=torch.device("cpu"), dtype=torch.float32, batch_size=1)
