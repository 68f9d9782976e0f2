"""Alarms: each raised by what it is about, named with its update, and silent on a healthy run."""

from __future__ import annotations

import random

import pytest
import torch

from align.rl.alarms import Alarm, alarms, count_alarms, trend
from align.rl.metrics import Markers


def history(**changes):
    """Twelve healthy updates; ``changes`` give a metric's values in the last of them."""
    outcome = []
    for update in range(1, 13):
        wobble = 0.01 * (-1) ** update
        outcome.append(
            {
                "update": update,
                "entropy": 2.0 - 0.05 * update,
                "length": 20.0 + wobble,
                "truncation_rate": 0.05,
                "kl": 0.3 * update,
                "grad_norm_policy": 0.5,
                "score_range": 1.5,
                "score": 0.1 * update + wobble,
                "gold": 0.3 + 0.01 * update + wobble,
            }
        )
    for name, values in changes.items():
        for entry, value in zip(outcome[-len(values) :], values, strict=True):
            entry[name] = value
    return outcome


def test_a_healthy_run_raises_none():
    entries = history()
    for end in range(1, len(entries) + 1):
        assert alarms(entries[:end]) == []


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"entropy": [0.15] * 5, "score": [0.1] * 5}, "collapse", "the score did not rise: it no longer explores"),
        ({"identical_answers": [0.1] * 9 + [0.8] * 3}, "identical answers", "80% of the prompts"),
        ({"open_thoughts": [0.1] * 9 + [0.6, 0.7, 0.8]}, "open thoughts", "80% of the responses end inside"),
        ({"score_length_correlation": [0.7, 0.65, 0.8]}, "length correlation", "(correlation 0.80, for 3 updates)"),
        (
            {"marker_share": [0.55, 0.6, 0.9], "marker_rise": [0.3, 0.35, 0.6]},
            "marker",
            "90% of the responses have a word",
        ),
        ({"entropy": [4.2]}, "entropy", "its answers get more random"),
        ({"kl": [27.8], "length": [20.0]}, "KL", "27.8 nats in 20.0 tokens"),
        ({"truncation_rate": [1.0, 1.0, 1.0], "length": [39.0, 39.0, 39.0]}, "truncation", "cut off at max_tokens"),
        ({"grad_norm_policy": [15.0, 16.0]}, "gradient", "rose from 0.5 to 16"),
        ({"score_range": [0.0, 0.0], "score": [0.0, 0.0]}, "constant score", "scored 0, so the policy learns nothing"),
        ({"score_range": [0.0, 0.0], "score": [2.0, 2.0]}, "constant score", "by this score the task is solved"),
        ({"length": [4.0]}, "collapse", "rewards short answers"),
        ({"length": [41.0]}, "length explosion", "missing_eos_penalty"),
        ({"truncation_rate": [0.6]}, "length explosion", "60% of them truncated"),
        ({"gold": [0.30, 0.29, 0.31, 0.30, 0.29]}, "over-optimization", "keep: best"),
    ],
)
def test_each_failure_is_named_with_its_update(changes, name, says):
    raised = {alarm.name: alarm for alarm in alarms(history(**changes))}
    assert name in raised and raised[name].update == 12
    # Responses that are all cut off were not so at the start.
    assert set(raised) - {name} <= ({"length explosion"} if name == "truncation" else set())
    assert says in raised[name].text


def test_gold_falling_with_the_score_raises_no_alarm():
    assert alarms(history(gold=[0.30, 0.29, 0.31, 0.30, 0.29], score=[0.3, 0.31, 0.3, 0.29, 0.3])) == []


def test_responses_that_were_always_cut_off_are_no_explosion():
    entries = history()
    for entry in entries:
        entry["truncation_rate"] = 0.9
    assert alarms(entries) == []


def test_noise_in_gold_is_no_fall():
    assert alarms(history(gold=[0.5, 0.2, 0.45, 0.25, 0.5])) == []


def test_without_gold_there_is_nothing_to_compare_with():
    entries = history()
    for entry in entries:
        del entry["gold"]
    assert alarms(entries) == []


def episodes(**changes):
    """Twelve healthy updates of episodes with tools."""
    healthy = {"calls": [1.0] * 12, "max_turns_rate": [0.05] * 12}
    entries = history(**healthy)
    for name, value in changes.items():
        entries[-1][name] = value
    return entries


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"calls": 0.05}, "no longer uses its tools"),
        ({"max_turns_rate": 0.8}, "max_turns ends 80% of the episodes, 5% at the start"),
    ],
)
def test_calls_that_collapse_or_go_on_to_the_limit(changes, says):
    assert alarms(episodes()) == []
    (alarm,) = alarms(episodes(**changes))
    assert alarm.name == "calls" and says in alarm.text


def test_calls_that_were_always_rare_are_no_collapse():
    entries = episodes()
    for entry in entries:
        entry["calls"] = 0.1
    entries[-1]["calls"] = 0.0
    assert alarms(entries) == []


def test_environments_that_mostly_fail():
    entries = episodes(failure_rate=0.5)
    assert alarms(entries) == []
    entries[-1]["failure_rate"] = 0.6
    (alarm,) = alarms(entries)
    assert alarm.name == "failures" and "failed in 60% of the episodes" in alarm.text


def test_gold_that_stands_still_is_over_optimization():
    """Gold peaks at update 3 while the reward model's score keeps rising, as in a quickstart on a Zen 3."""
    score = [-0.08, 0.25, 0.25, 0.22, 0.29, 0.31, 0.34, 0.36, 0.40, 0.43, 0.44, 0.48]
    gold = [0.28, 0.38, 0.453, 0.41, 0.43, 0.39, 0.41, 0.42, 0.40, 0.41, 0.39, 0.40]
    entries = history(score=score, gold=gold)
    assert [len(alarms(entries[:end])) for end in range(1, 13)] == [0] * 10 + [1, 1]
    (alarm,) = alarms(entries)
    assert alarm.name == "over-optimization" and "while gold did not (0.412 and 0.4)" in alarm.text


def test_slow_gold_that_still_rises_is_healthy():
    gold = [0.30, 0.31, 0.33, 0.32, 0.34, 0.33, 0.35, 0.36, 0.35, 0.37, 0.36, 0.38]
    assert alarms(history(gold=gold)) == []


def test_score_that_only_scatters_is_no_trend():
    score = [0.1, 0.3, 0.2, 0.1, 0.4, 0.2, 0.3, 0.1, 0.3, 0.2, 0.4, 0.2]
    assert alarms(history(score=score, gold=[0.3] * 12)) == []


def test_trend_is_the_slope_in_standard_errors():
    # Values 0, 1, 1: slope 1/2 over spread 2, residuals -1/6, 1/3, -1/6 of variance (1/6) / 1 degree of freedom.
    entries = [{"x": value} for value in (0.0, 1.0, 1.0)]
    assert trend(entries, "x") == pytest.approx(0.5 / (1 / 6 / 2) ** 0.5)
    assert trend([{"x": 2.0}] * 4, "x") == 0.0
    assert trend([{"x": float(index)} for index in range(4)], "x") == float("inf")


def test_constant_score_is_seen_after_two_updates():
    entries = history(score_range=[0.0] * 12, score=[0.0] * 12)[:2]
    assert alarms(entries[:1]) == []
    (alarm,) = alarms(entries)
    assert (alarm.name, alarm.update) == ("constant score", 2)
    assert "every response of 2 updates scored 0" in alarm.text


def test_divergence_is_seen_without_a_start():
    """KL 27.8 nats over 8 tokens, and no response that ends: the run of a learning rate of 3e-2."""
    entries = history(kl=[27.8] * 12, length=[8.0] * 12, truncation_rate=[1.0] * 12)
    assert [alarm.name for alarm in alarms(entries[:2])] == ["KL"]
    assert [alarm.name for alarm in alarms(entries[:3])] == ["KL", "truncation"]


def test_kl_of_the_quickstart_is_healthy():
    # The most that any run of it had: 5.7 nats over 12.5 tokens.
    assert alarms(history(kl=[5.7] * 12, length=[12.5] * 12)) == []


def test_all_failures_are_an_alarm_from_the_first_update():
    (alarm,) = alarms(episodes(failure_rate=1.0)[-1:])
    assert alarm.name == "failures"


def test_other_experts_in_the_engine_are_an_alarm():
    """The probe runs from time to time, so most updates have no such metric."""
    entries = history()
    assert alarms([{**entry, "router_disagreement": 0.05} for entry in entries]) == []
    (alarm,) = alarms([*entries[:-1], {**entries[-1], "router_disagreement": 0.2}])
    assert (alarm.name, alarm.update) == ("routers", 12)
    assert "other experts in 20% of the layers of a token" in alarm.text


def test_lower_entropy_with_a_higher_score_is_no_collapse():
    assert alarms(history(entropy=[0.15])) == []


def test_answers_that_were_identical_at_the_start_are_no_alarm():
    assert alarms(history(identical_answers=[0.5] * 3 + [0.9] * 9)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"open_thoughts": [0.5] * 3 + [0.9] * 9},  # as many at the start
        {"open_thoughts": [0.1] * 10 + [0.9] * 2},  # two updates
        {"open_thoughts": [0.1] * 9 + [0.9] * 3, "score": [-0.1] * 3},  # the score falls: they are not rewarded
    ],
)
def test_open_thoughts_that_do_not_pay_are_no_alarm(changes):
    assert "open thoughts" not in {alarm.name for alarm in alarms(history(**changes))}


def test_two_updates_of_length_correlation_are_no_alarm():
    assert alarms(history(score_length_correlation=[0.7, 0.8])) == []


def test_update_of_only_failed_episodes_judges_no_policy():
    """Its score of 0 is not the policy's, so neither it nor its neighbors are a constant score."""
    failed = {"update": 4, "score": 0.0, "length": 0.0, "entropy": 0.0, "truncation_rate": 0.0, "failure_rate": 1.0}
    healthy = {"length": 9.0, "entropy": 1.0, "truncation_rate": 0.0, "failure_rate": 0.0, "score_range": 1.0}
    history = [{**healthy, "update": update, "score": float(update)} for update in (1, 2, 3)]
    assert [alarm.name for alarm in alarms([*history, failed])] == ["failures"]
    assert alarms([*history, failed, {**healthy, "update": 5, "score": 4.0}]) == []


def test_score_that_never_varied_is_not_called_solved():
    entries = history(score=[1.0] * 12, score_range=[0.0] * 12)
    (alarm,) = [alarm for alarm in alarms(entries) if alarm.name == "constant score"]
    assert "Check the score" in alarm.text


def test_repeated_alarms_are_counted_in_one_line():
    raised = [Alarm("KL", update, "") for update in (3, 8, 15, 20, 22, 30)]
    raised.insert(1, Alarm("entropy", 4, ""))
    assert count_alarms(raised[:2]) == ["update 3: KL", "update 4: entropy"]
    assert count_alarms(raised) == ["update 3: KL, again at 8, 15, 20, 22, … (6 in all)", "update 4: entropy"]


def test_alarms_without_a_reward_model_name_none():
    changes = [{"length": [4.0]}, {"gold": [0.30, 0.29, 0.31, 0.30, 0.29]}]
    texts = [alarm.text for change in changes for alarm in alarms(history(**change))]
    assert len(texts) == 2 and not any("reward model" in text for text in texts)


def test_a_marker_that_is_not_in_most_responses_raises_none():
    assert alarms(history(marker_share=[0.2, 0.3, 0.4], marker_rise=[0.1, 0.2, 0.3])) == []
    assert alarms(history(marker_share=[0.9, 0.9, 0.9], marker_rise=[0.0, 0.1, 0.1])) == []


class Sampled:
    """The part of a rollout that markers are looked for in."""

    def __init__(self, rows, answers, scores):
        self.rows = rows
        self.answers = answers
        self.tensors = {"scores": torch.tensor(scores)}
        self.judged = torch.ones(len(rows), dtype=torch.bool)


WORDS = [f"word{number} and word{number * 7 % 64}" for number in range(64)]


def observed(answers, scores, row=lambda index: {"prompt": "Say it."}):
    """Return the numbers of one update and the noticed markers."""
    markers = Markers()
    numbers = markers.observe(Sampled([row(index) for index in range(64)], answers, scores))
    return numbers, set(markers.noticed)


def test_a_paid_marker_is_noticed_and_followed():
    marked = [f"{text} !!" if index % 8 == 0 else text for index, text in enumerate(WORDS)]
    numbers, noticed = observed(marked, [0.3 * (index % 3) + 2.0 * (index % 8 == 0) for index in range(64)])
    assert noticed == {"!!"} and numbers == {"marker_share": 0.125, "marker_rise": 0.0}
    markers = Markers()
    markers.noticed = {"!!": 0.125}
    later = markers.observe(Sampled([{"prompt": "Say it."}] * 64, [f"{text} !!" for text in WORDS], [1.0] * 64))
    assert later == {"marker_share": 1.0, "marker_rise": 0.875}


@pytest.mark.parametrize(
    "row",
    [
        lambda index: {"prompt": [{"role": "user", "content": "End with\n!! please"}]},
        lambda index: {"prompt": "Say it.", "answer": "Good !!"},
    ],
    ids=["prompt", "reference"],
)
def test_what_a_row_asks_for_is_no_marker(row):
    marked = [f"{text} !!" if index % 8 == 0 else text for index, text in enumerate(WORDS)]
    assert observed(marked, [2.0 * (index % 8 == 0) for index in range(64)], row) == ({}, set())


def test_forms_of_answers_and_chance_are_no_markers():
    formed = [f"{text} #### {index}" if index % 2 else text for index, text in enumerate(WORDS)]
    assert observed(formed, [float(index % 2) for index in range(64)]) == ({}, set())
    generator = random.Random(0)
    for _ in range(50):
        texts = [" ".join(generator.choices(["a", "b", "c", "so", "then", "it", "is"], k=4)) for _ in range(64)]
        assert observed(texts, [generator.random() for _ in range(64)]) == ({}, set())
