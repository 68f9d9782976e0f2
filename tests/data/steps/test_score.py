"""Scores decide: by bounds, by quantiles, within sources; and are those of the model."""

import math

import numpy as np
import pytest
import torch

from align.config.recipe.step_settings import ScoreStep
from align.data.rows import assistant, user
from align.data.steps.score import ABOVE, BELOW, NO_SCORE
from align.models.chat.render import render_conversation, render_prompt
from align.models.loading import load_policy, load_tokenizer
from align.models.reward import RewardModel
from tests.support.data.steps.tables import decide, kept, row
from tests.support.models.joining_tokenizer import make_joining_tokenizer
from tests.support.models.scaled_logits import make_scaling_model

ROWS = [row(f"q{i}", completion="x" * (i + 1), source=i % 2) for i in range(10)]


def lengths(rows):
    return [
        math.nan if result_row["completion"][0]["content"] == "x" else len(result_row["completion"][0]["content"])
        for result_row in rows
    ]


def few(rows):
    return [1.0]


def by_length(**keep):
    return ScoreStep(type="score", by="function", function=f"{__name__}:lengths", keep=keep)


def test_bounds_and_rows_without_a_score():
    verdict = decide(by_length(above=3, below=6), ROWS)
    assert kept(verdict) == [2, 3, 4, 5]
    reasons = [verdict.reasons[code] for code in verdict.code if code >= 0]
    assert reasons == [NO_SCORE, BELOW, ABOVE, ABOVE, ABOVE, ABOVE]
    assert verdict.columns["score"][3] == 4


def test_quantiles_are_of_all_living_rows_with_a_score():
    # scores 2 to 10, their median 6
    assert kept(decide(by_length(quantiles=(0.5, 1)), ROWS)) == [5, 6, 7, 8, 9]
    # of 2 to 6 alone it is 4, and dead rows change nothing
    alive = [index <= 5 for index in range(10)]
    left = kept(decide(by_length(quantiles=(0.5, 1)), ROWS, alive=alive))
    assert [index for index in left if alive[index]] == [3, 4, 5]


def test_quantiles_within_each_source():
    # source a: 3, 5, 7, 9 (1 has no score); source b: 2, 4, 6, 8, 10
    left = kept(decide(by_length(quantiles=(0.5, 1), per_source=True), ROWS))
    assert left == [5, 6, 7, 8, 9]
    assert kept(decide(by_length(quantiles=(0, 0.25), per_source=True), ROWS)) == [1, 2, 3]
    assert decide(by_length(per_source=True), ROWS).notes["b"]["quantiles"] == [2, 2.8, 4, 6, 8, 9.2, 10]


def test_shards_change_nothing():
    first, second = decide(by_length(quantiles=(0.2, 0.7)), ROWS), decide(by_length(quantiles=(0.2, 0.7)), ROWS, cut=3)
    assert (first.code == second.code).all()


def test_a_function_must_score_every_row(refused):
    refused(lambda: decide(ScoreStep(type="score", by="function", function=f"{__name__}:few"), ROWS))


@pytest.mark.parametrize(
    "settings",
    [
        {"by": "function"},
        {"by": "reward"},
        {"by": "reward", "model": "m", "keep": {"quantiles": [0.9, 0.1]}},
        {"by": "reward", "model": "m", "keep": {"above": 2, "below": 1}},
    ],
)
def test_contradictions_are_refused(refused, settings):
    refused(ScoreStep, type="score", **settings)


def test_a_missing_model_is_named(refused, tmp_path):
    config = ScoreStep(type="score", by="perplexity", model="nowhere")
    refused(decide, config, ROWS, base=tmp_path)
    refused(lambda: decide(ScoreStep(type="score", by="perplexity", model="input 0"), ROWS))


def test_reward_is_the_models(tiny_reward):
    config = ScoreStep(type="score", by="reward", model="input 0", precision="float32", batch_size=3)
    scores = decide(config, ROWS[:4], inputs=(tiny_reward,)).columns["score"]
    model = RewardModel(tiny_reward, precision="float32")
    expected = model.score(
        [result_row["prompt"] for result_row in ROWS[:4]],
        [result_row["completion"][0]["content"] for result_row in ROWS[:4]],
    )
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def likelihood(model, ids, skip):
    """Mean negative log-likelihood of the tokens behind the first ``skip``."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return -float(np.mean([log_p[index - 1, ids[index]].item() for index in range(skip, len(ids))]))


def test_perplexity_and_difficulty_are_those_of_the_plain_model(tiny_model):
    model, tokenizer = load_policy(tiny_model), load_tokenizer(tiny_model)
    settings = {"type": "score", "model": str(tiny_model), "precision": "float32", "batch_size": 2}
    perplexity = decide(ScoreStep(by="perplexity", **settings), ROWS[:3]).columns["score"]
    difficulty = decide(ScoreStep(by="ifd", **settings), ROWS[:3]).columns["score"]
    for index, result_row in enumerate(ROWS[:3]):
        prompt = render_prompt(tokenizer, result_row["prompt"])
        conversation = render_conversation(tokenizer, [*result_row["prompt"], *result_row["completion"]])
        conditioned = likelihood(model, conversation, len(prompt))
        begin = prompt[:1] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        alone = likelihood(model, [*begin, *conversation[len(prompt) :]], 1)
        assert perplexity[index] == pytest.approx(math.exp(conditioned), rel=1e-4)
        assert difficulty[index] == pytest.approx(math.exp(conditioned - alone), rel=1e-4)


def score(folder, *rows):
    """Perplexity of each row by the step."""
    config = ScoreStep(type="score", by="perplexity", model=str(folder), precision="float32", batch_size=2)
    return decide(config, list(rows)).columns["score"]


def test_perplexity_is_of_the_models_scaled_logits(tmp_path):
    model, tokenizer = load_policy(make_scaling_model(tmp_path)), load_tokenizer(tmp_path)
    conversation = render_conversation(tokenizer, [*ROWS[3]["prompt"], *ROWS[3]["completion"]])
    expected = likelihood(model, conversation, len(render_prompt(tokenizer, ROWS[3]["prompt"])))
    assert score(tmp_path, ROWS[3])[0] == pytest.approx(math.exp(expected), rel=1e-4)


def test_the_turns_before_the_last_one_are_its_context(tiny_model):
    prompt, before, last = [user("which wall?")], [assistant("!look"), user("blue")], assistant("the blue one")
    episode = row("episode") | {"prompt": prompt, "completion": [*before, last]}
    flat = row("flat") | {"prompt": [*prompt, *before], "completion": [last]}
    without = row("without") | {"prompt": prompt, "completion": [last]}
    scores = score(tiny_model, episode, flat, without)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[0] != pytest.approx(scores[2], rel=1e-3)


def test_answer_that_merges_with_prompt_is_scored_as_sampled(tiny_model, tmp_path):
    model, tokenizer = load_policy(tiny_model), make_joining_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = row("code") | {"prompt": [user("def f(x):")], "completion": [assistant("    return x\n")]}
    prompt = render_prompt(tokenizer, code["prompt"])
    answer = [*tokenizer("    return x\n")["input_ids"], tokenizer.eos_token_id]
    assert render_conversation(tokenizer, [*code["prompt"], *code["completion"]]) != [*prompt, *answer]
    expected = likelihood(model, [*prompt, *answer], len(prompt))
    assert score(tmp_path, code)[0] == pytest.approx(math.exp(expected), rel=1e-4)


def test_a_prompt_that_fills_the_context_has_no_score(tiny_model):
    config = ScoreStep(type="score", by="perplexity", model=str(tiny_model), precision="float32", max_length=8)
    verdict = decide(config, [row("a long question " * 20)])
    assert verdict.reasons[verdict.code[0]] == NO_SCORE
