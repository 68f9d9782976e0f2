"""Measurements that need no model: KL with the sampler's gap, results kept between attempts."""

import math

import pytest

from align.config.scores import MetricFunction
from align.evaluation.answers import ResponseSet
from align.evaluation.drift import kl_values, read_responses
from align.evaluation.scoring import (
    ResultCache,
    metric_values,
    score_responses,
    shape_values,
    thought_values,
)
from align.inference.protocol import Response
from align.scoring.score import Part, WeightedSum
from align.scoring.scored import Scored, Scorer
from align.scoring.verifiers import open_verifier


def test_kl_and_sampler_gap_by_hand():
    response = Response([7, 2], [-1.5, -0.5], True, "x")
    two = Response([8], [-2.0], False, "y")
    response_set = ResponseSet("e", [[response], [two]])
    requests = []

    def own(prompts, responses):
        requests.append((prompts, responses))
        return [[-1.0, -0.5], [-2.0]]

    logprobs = read_responses(own, [([[1], [3]], response_set)])
    actual = kl_values(logprobs[0], [[-2.0, -1.0], [-2.5]], response_set)
    assert requests == [([[1], [3]], [[7, 2], [8]])]
    assert actual["kl"] == [[1.5], [0.5]]
    assert actual["kl_k3"][1] == [pytest.approx(0.1065307)]  # exp(-0.5) - 1 + 0.5
    assert actual["token_kl"] == [[1.0, 0.5], [0.5]]
    assert actual["sampler_gap"] == pytest.approx(0.5 / 3)


def test_forced_tokens_have_no_kl():
    response = Response([7, 8, 2], [-1.5, 0.0, -0.5], True, "x", forced=[1])
    actual = kl_values([[-1.0, -9.0, -0.5]], [[-2.0, -3.0, -1.0]], ResponseSet("e", [[response]]))
    assert actual["kl"] == [[1.5]]
    assert actual["token_kl"] == [[1.0, 0.0, 0.5]]
    assert actual["sampler_gap"] == 0.25  # of the two sampled tokens


def test_verifier_as_metric_has_reasons():
    responses = [Response([4], [0.0], True, text) for text in ("It is 5.", "4 or 5", "6")]
    scorer = open_verifier(MetricFunction(number="answer"), "metrics[0]")
    response_set = ResponseSet("e", [responses])
    values = metric_values(score_responses(scorer, [{"answer": "5"}], response_set), "right", response_set)
    assert values["right"] == [[1.0, 0.0, 0.0]] and values["right_no_answer"] == [[0.0, 1.0, 0.0]]
    assert values["right_unequal"] == [[0.0, 0.0, 1.0]]


def test_programs_read_answers_and_lengths_are_of_answers():
    thinking = Response([4, 5, 7, 2], [0.0] * 4, True, "<think>a</think>yes", thought_tokens=2, thought_end=16)
    cut_off = Response([4, 5], [0.0] * 2, False, "<think>b", thought_tokens=2, thought_end=8, is_open=True)
    response_set = ResponseSet("e", [[thinking, cut_off]])
    seen = []

    class Recorder(Scorer):
        def score(self, rows, responses, truncated=None):
            seen.extend(responses)
            return Scored([1.0, 0.0])

    assert metric_values(score_responses(Recorder(), [{}], response_set), "m", response_set) == {"m": [[1.0, 0.0]]}
    assert seen == ["yes", ""] and seen[0].thought == "<think>a</think>" and seen[1].is_open
    assert shape_values(response_set) == {"length": [[2.0, 0.0]], "finished": [[1.0, 0.0]]}
    assert thought_values(response_set) == {"thought_length": [[2.0, 2.0]], "open_thoughts": [[0.0, 1.0]]}


def test_results_are_kept_under_their_identity(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": [len(calls)]}

    warnings = []
    results = ResultCache(tmp_path, warnings.append)
    assert results.read_or_compute("x", "a", compute) == {"value": [1]}
    assert results.read_or_compute("x", "a", compute) == {"value": [1]}
    assert results.read_or_compute("x", "b", compute) == {"value": [2]}
    assert warnings == []
    (tmp_path / "x-b.jsonl").write_text("{")
    assert results.read_or_compute("x", "b", compute) == {"value": [3]}
    assert len(warnings) == 1 and "x-b.jsonl" in warnings[0]
    assert results.read_or_compute("x", "a", compute) == {"value": [1]}  # still there


class BrokenReward(Scorer):
    """A reward model with NaN among its weights."""

    def score(self, rows, responses, truncated=None):
        return Scored([math.nan], metrics={"metric": [math.nan]})


def test_a_score_that_is_no_number_stays_in_sight():
    response_set = ResponseSet("e", [[Response([7], [-1.5], True, "x")]])
    scorer = WeightedSum((Part("rm", 1.0, BrokenReward()),), is_list=True)
    # The metric is one that this response lacks, as far as anybody can tell.
    scored = score_responses(scorer, [{"id": "1"}], response_set)
    assert set(metric_values(scored, "score", response_set)) == {"score", "score_rm"}
