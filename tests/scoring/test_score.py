"""Weighted sums of rewards, ensembles of reward models, and rewards that wait at the same time."""

import asyncio
import time

import pytest

from align.data import event_loop
from align.scoring.functions import FunctionScorer
from align.scoring.models import Ensemble, combine
from align.scoring.score import Part, WeightedSum
from align.scoring.scored import Scored
from tests.support.rl.trainers import Fixed


def test_combinations_by_hand():
    assert combine([1.0, 2.0, 6.0], "mean", 1.0) == 3.0
    assert combine([1.0, 2.0, 6.0], "minimum", 1.0) == 1.0
    # variance (4 + 1 + 9) / 3
    assert combine([1.0, 2.0, 6.0], "uncertainty", 0.5) == pytest.approx(3.0 - 0.5 * 14 / 3)


def test_ensemble_reports_spread_of_its_members():
    scored = Ensemble((Fixed(1.0, 4.0), Fixed(3.0, 4.0)), "minimum").score([{}, {}], ["a", "b"])
    assert scored == Scored([1.0, 4.0], metrics={"spread": [1.0, 0.0]})


def test_a_sum_weighs_its_parts_and_names_them():
    ensemble = Ensemble((Fixed(1.0, 4.0), Fixed(3.0, 4.0)), "mean")
    both = WeightedSum((Part("reward", 2.0, ensemble), Part("function", 0.5, Fixed(4.0, 0.0))))
    scored = both.score([{}, {}], ["a", "b"])
    assert scored.total == [6.0, 8.0]  # 2 * 2 + 0.5 * 4;  2 * 4
    columns = {"reward": [2.0, 4.0], "reward_spread": [1.0, 0.0], "function": [4.0, 0.0]}
    # Files list the columns in this order.
    assert list(scored.columns().items()) == list(columns.items())


def test_a_single_part_is_not_repeated():
    assert WeightedSum((Part("reward", 2.0, Fixed(1.5)),)).score([{}], ["a"]) == Scored([3.0])
    ensemble = Ensemble((Fixed(1.0), Fixed(3.0)), "mean")
    scored = WeightedSum((Part("reward", 1.0, ensemble),)).score([{}], ["a"])
    assert scored == Scored([2.0], metrics={"reward_spread": [1.0]})


def test_a_list_tells_each_reward_by_its_name_even_a_single_one():
    metrics = FunctionScorer("f", lambda rows, texts: [{"score": 2.0, "tokens": 3} for _ in texts])
    scored = WeightedSum((Part("brevity", 0.5, metrics),), is_list=True).score([{"id": "1"}], ["a"])
    assert (scored.total, scored.columns()) == ([1.0], {"brevity": [2.0], "brevity_tokens": [3.0]})


def test_two_rewards_must_not_share_a_metric_s_name(refused):
    metrics = FunctionScorer("f", lambda rows, texts: [{"score": 2.0, "b": 3} for _ in texts])
    both = WeightedSum((Part("a", 1.0, metrics), Part("a_b", 1.0, Fixed(1.0))))
    refused(lambda: both.score([{"id": "1"}], ["a"]).columns())


def test_rewards_that_wait_do_so_at_the_same_time():
    meeting = None

    async def meet(rows, texts):
        nonlocal meeting
        meeting = meeting or asyncio.Barrier(2)
        # Alone, either would wait for ever.
        await asyncio.wait_for(meeting.wait(), 20)
        return [1.0 for _ in texts]

    both = WeightedSum((Part("a", 1.0, FunctionScorer("a", meet)), Part("b", 2.0, FunctionScorer("b", meet))))
    assert both.score([{"id": "1"}], ["a"]).total == [3.0]


def test_rewards_that_begin_at_the_same_time_share_one_loop(monkeypatch):
    """As the first of their process: a loop that takes its time to start must not have the other start one, too."""
    start = asyncio.new_event_loop

    def start_slowly():
        time.sleep(0.2)
        return start()

    async def loop_of(rows, texts):
        loops.append(asyncio.get_running_loop())
        return [1.0 for _ in texts]

    loops = []
    event_loop._loop.cache_clear()
    monkeypatch.setattr(asyncio, "new_event_loop", start_slowly)
    both = WeightedSum((Part("a", 1.0, FunctionScorer("a", loop_of)), Part("b", 2.0, FunctionScorer("b", loop_of))))
    both.score([{"id": "1"}], ["a"])
    assert len(loops) == 2 and loops[0] is loops[1]
