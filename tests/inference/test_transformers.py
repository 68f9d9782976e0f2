"""The transformers engine: its log-probabilities are the model's, its samples do not depend on the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.inference.parity import trainer_logprobs
from align.inference.protocol import Sampling
from align.inference.transformers import TransformersEngine
from align.models.loading import load_policy
from align.models.tuning.merged_weights import merged_weights

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
    drawn = engine.generate(PROMPTS, Sampling(24, temperature=temperature, n=2, seed=4))
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    flat = [response for some in drawn for response in some]
    ours = trainer_logprobs(load_policy(tiny_model), prompts, [one.token_ids for one in flat], temperature)
    theirs = torch.tensor([value for one in flat for value in one.logprobs])
    assert torch.allclose(ours, theirs, atol=1e-5)
    scored = engine.score_tokens(prompts, [one.token_ids for one in flat], temperature)
    assert torch.allclose(torch.tensor([value for some in scored for value in some]), theirs, atol=1e-5)


def test_samples_do_not_depend_on_the_batch(tiny_model: Path) -> None:
    sampling = Sampling(24, n=3, seed=9)
    together, alone = (_engine(tiny_model, size).generate(PROMPTS, sampling) for size in (64, 1))
    assert [[one.token_ids for one in some] for some in together] == [[one.token_ids for one in some] for some in alone]
    assert len({tuple(one.token_ids) for one in together[0]}) == 3
    again = _engine(tiny_model).generate(PROMPTS, Sampling(24, n=3, seed=10))
    assert again[0][0].token_ids != together[0][0].token_ids


def test_ends_at_eos_and_says_whether_it_did(tiny_model: Path) -> None:
    engine = _engine(tiny_model)
    engine.eos = 100  # any common token: a random model rarely says the real one
    responses = [one for some in engine.generate(PROMPTS * 8, Sampling(60, seed=1)) for one in some]
    finished = [one for one in responses if one.finished]
    assert finished
    assert len(finished) < len(responses)
    for one in responses:
        assert len(one.token_ids) == len(one.logprobs) <= 60
        assert one.finished == (one.token_ids[-1] == 100)
        assert 100 not in one.token_ids[:-1]
        assert one.finished or len(one.token_ids) == 60


def test_greedy_is_the_argmax(tiny_model: Path) -> None:
    found = _engine(tiny_model).generate(PROMPTS[:1], Sampling(6, temperature=0))[0][0].token_ids
    model, ids = load_policy(tiny_model), list(PROMPTS[0])
    for token in found:
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


def test_progress_and_global_randomness(tiny_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    torch.manual_seed(2)
    before = torch.get_rng_state()
    _engine(tiny_model, 3).generate(PROMPTS, Sampling(4, n=2), lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_head_is_given_what_its_product_needs_no_copy_for(tiny_model: Path) -> None:
    # a slice of the hidden states makes torch's CPU product copy the head, once for each sequence
    engine = TransformersEngine(tiny_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=4)
    given = []
    engine.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    engine.generate([[5, 6, 7], [8]], Sampling(max_tokens=2))
    assert given and all(inputs.is_contiguous() for inputs in given)
