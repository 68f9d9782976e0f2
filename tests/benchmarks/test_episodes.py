"""What ``benchmarks.episodes`` does without measuring: scripts, tables, bounds, options, and both sides' turns."""

import subprocess
import sys
from pathlib import Path

import pytest

from align.environments.episode import CallRecord, Episode, PolicyTurn
from align.environments.player import EpisodeTask
from align.inference.protocol import Response, TurnRequest
from benchmarks.episodes import check_trl, comparison_shape, latency_shape, parse, side_arguments
from benchmarks.episodes_align import ScriptedSession, check_played, count_tokens, forced_lengths, open_player
from benchmarks.episodes_latency import play_order
from benchmarks.episodes_table import (
    episode_seconds,
    latency_bound,
    latency_lines,
    latency_summary,
    lines,
    summary,
    tokens_line,
)
from benchmarks.episodes_trl import PhaseClock, ScriptedTurns, TrlShelf
from benchmarks.episodes_trl import count_tokens as count_trl_tokens
from benchmarks.episodes_work import (
    EpisodeShape,
    Markup,
    ScriptedTurn,
    ShelfEnvironment,
    count_calls,
    describe,
    load_tokenizer,
    make_script,
    turn_sizes,
)


def make_run(seconds, engine="vllm", **more):
    """Updates of these lengths of 4 episodes, two fifths of each sampling, a tenth each of three phases."""
    updates = [
        {"sampling": 0.4 * s, "scoring": 0.1 * s, "measuring": 0.1 * s, "learning": 0.1 * s, "seconds": s}
        | {"prompt_tokens": 60, "sampled_tokens": 30, "tool_tokens": 10, "calls": 8, "episodes": 4}
        for s in seconds
    ]
    return {"updates": updates, "peak_gib": 2.0, "engine": engine} | more


def make_rounds():
    return [
        {"align": make_run([10.0]), "trl": make_run([40.0], "transformers")},
        {"align": make_run([30.0]), "trl": make_run([40.0], "transformers")},
        {"align": make_run([20.0]), "trl": make_run([40.0], "transformers")},
    ]


def test_seconds_are_of_an_episode_and_of_an_update():
    # updates of 10 and 20 s, median 15 s, of which 6 s sample 4 episodes
    assert episode_seconds(make_run([10.0, 20.0])) == pytest.approx({"sampling": 1.5, "whole": 3.75, "update": 15.0})


def test_summary_has_the_median_of_the_rounds_ratios():
    found = summary(make_rounds())
    assert found["align"]["update"] == 20.0
    assert found["trl"]["sampling"] == pytest.approx(4.0)
    assert found["update_ratios"] == [0.25, 0.75, 0.5]
    assert found["update_ratio"] == 0.5
    assert found["sampling_ratio"] == pytest.approx(0.5)


def test_lines_say_whether_the_targets_are_met():
    text = lines(make_rounds())
    assert text[-2] == "an episode sampled: 0.50 of trl's time; target at most 1: met"
    assert text[-1] == "an update: 0.50 of trl's time; target at most 0.5: met"
    slower = [{"align": make_run([60.0]), "trl": make_run([40.0])}]
    assert [line.rsplit(": ", 1)[-1] for line in lines(slower)[-2:]] == ["missed", "missed"]


def test_one_side_alone_has_no_ratio():
    text = lines([{"align": make_run([10.0])}])
    assert text[-1].startswith("align: 1.00 s to sample an episode, 2.50 s of an update")


def test_tokens_of_both_sides_are_named():
    expected = "60 prompt + 30 sampled + 10 tool (8 calls, engine"
    assert tokens_line(make_rounds()) == (f"tokens an update: align {expected} vllm); trl {expected} transformers)")


def test_bound_is_sampling_and_a_call_for_each_turn():
    assert latency_bound(10.0, calls=3, tool_seconds=1.0) == pytest.approx(16.0)


def make_latency(quick, slow):
    def plays(seconds, hit_rate):
        return [{"seconds": value, "prefix_hit_rate": hit_rate} for value in seconds]

    about = {"episodes": 64, "calls": 3, "tool_seconds": 1.0, "workers": 64, "isolation": "thread", "engine": "vllm"}
    return {"quick": plays(quick, 0.8), "slow": plays(slow, 0.7)} | about


def test_slow_tools_are_held_against_the_bound_of_their_own_pair():
    # bounds 16 and 29 s: shares 15 / 16 and 29 / 29
    found = latency_summary(make_latency([10.0, 20.0], [15.0, 29.0]))
    assert found["worst_share"] == pytest.approx(1.0)
    assert found["share"] == pytest.approx((15 / 16 + 1) / 2)
    assert found["bound"] == pytest.approx(1.3 * 15 + 3)
    text = latency_lines(make_latency([10.0], [15.0]))
    assert text[2] == "bound: 1.3 x 10.0 s + 3 calls x 1 s = 16.0 s; 0.94 of it (worst of 1: 0.94): met"
    assert text[3] == "prompt tokens of turns from the prefix cache: 80%, with slow tools 70%"
    assert latency_lines(make_latency([10.0], [17.0]))[2].endswith("missed")


def test_an_engine_without_a_prefix_cache_has_no_line_about_it():
    run = make_latency([10.0], [15.0])
    for play in (*run["quick"], *run["slow"]):
        play["prefix_hit_rate"] = None
    assert len(latency_lines(run)) == 3


def test_plays_take_turns_after_one_that_warms_up():
    assert play_order(5) == ["quick", "quick", "slow", "slow", "quick"]


def test_turns_are_the_same_each_time_and_one_episode_is_full(refused):
    shape = EpisodeShape(batch=8, turns=4, tokens=40, updates=3)
    sizes = turn_sizes(shape, least=30)
    assert sizes == turn_sizes(shape, least=30)
    assert [len(episodes) for episodes in sizes] == [8, 8, 8]
    assert all([40] * 4 in episodes for episodes in sizes)
    assert {len(turns) for turns in sizes[0]} <= {2, 3, 4}
    assert all(30 <= size <= 40 for episodes in sizes for turns in episodes for size in turns)
    assert turn_sizes(EpisodeShape(batch=2, turns=2, tokens=40, lengths="full", updates=1), 30) == [[[40, 40]] * 2]
    refused(lambda: turn_sizes(EpisodeShape(tokens=20), least=30))


def test_script_calls_in_every_turn_but_the_last(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    shape = EpisodeShape(batch=4, turns=3, tokens=200, lengths="full", updates=1)
    (script,) = make_script(shape, tokenizer)
    assert count_calls(script) == 8
    for turns in script:
        *calls, last = turns
        assert last.tail == [tokenizer.eos_token_id]
        for turn in calls:
            assert turn.tail[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(turn.tail[:-1])
            assert text.startswith('<tool_call>{"name": "look_up"') and text.endswith("}</tool_call>")


def test_a_turn_keeps_its_length_and_gets_its_ending(refused):
    turn = ScriptedTurn(4, [8, 9])
    assert turn.complete([1, 2, 3, 4, 5]) == [1, 2, 8, 9]
    refused(turn.complete, [1, 2, 3])


def test_a_call_that_the_model_began_is_replaced():
    turn = ScriptedTurn(4, [8, 9])
    assert turn.complete([1, 2, 3, 4], Markup(frozenset({2, 3}), 7)) == [1, 7, 8, 9]


def test_both_environments_have_the_same_tool_and_score():
    ours, theirs = ShelfEnvironment(3, 0.0), TrlShelf(3, 0.0)
    ours.reset({"prompt": "any"})
    theirs.reset(prompt="any")
    assert ours.look_up(7) == theirs.look_up(7) == describe(7, 3)
    assert ours.score() == theirs.get_reward() == 0.007


class RepeatingSession:
    """Answers every turn with the token 5, as often as it may."""

    is_lockstep = True

    def __init__(self):
        self.requests = []

    @property
    def pending(self):
        return len(self.requests)

    def submit(self, request):
        self.requests.append(request)

    def poll(self, timeout=None):
        requests, self.requests = self.requests, []
        return [(r.key, Response([5] * r.max_tokens, [-1.0] * r.max_tokens, False, "")) for r in requests]

    def cache_statistics(self):
        return {"prefix_hit_rate": 0.5}

    def close(self):
        pass


class Decoder:
    def decode(self, ids, **_):
        return "x" * len(ids)


def test_session_follows_the_script():
    script = [[ScriptedTurn(3, [9])], [ScriptedTurn(2, [8, 9]), ScriptedTurn(4, [9])]]
    session = ScriptedSession(RepeatingSession(), script, Decoder())
    for key in (1, 0):
        session.submit(TurnRequest(key, [1], 100, 0))
    first = dict(session.poll())
    assert [first[key].token_ids for key in (0, 1)] == [[5, 5, 9], [8, 9]]
    assert first[0].finished and first[0].logprobs == [-1.0] * 3 and first[0].text == "xxx"
    session.submit(TurnRequest(1, [1], 100, 0))
    assert dict(session.poll())[1].token_ids == [5, 5, 5, 9]
    assert session.cache_statistics() == {"prefix_hit_rate": 0.5}


def test_session_refuses_an_episode_without_room(refused):
    session = ScriptedSession(RepeatingSession(), [[ScriptedTurn(3, [9])]], Decoder())
    refused(lambda: session.submit(TurnRequest(0, [1], 2, 0)))


class Engine:
    def __init__(self, name):
        self.name, self.eos = name, 2

    def sampling_params(self, request, temperature, top_p):
        return type("Params", (), {"max_tokens": request, "min_tokens": 0})()


def test_lengths_are_forced_only_while_episodes_are_played():
    engine = Engine("vllm")
    with forced_lengths(engine):
        assert engine.sampling_params(7, 1.0, 1.0).min_tokens == 7
    assert engine.sampling_params(7, 1.0, 1.0).min_tokens == 0
    engine = Engine("transformers")
    with forced_lengths(engine):
        assert engine.eos == -1
    assert engine.eos == 2


def test_player_carries_out_the_script(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    shape = EpisodeShape(batch=2, turns=2, tokens=200, lengths="full", updates=1, result_words=2)
    (script,) = make_script(shape, tokenizer)
    player = open_player(shape, tokenizer, [script], workers=2)
    tasks = [EpisodeTask({"prompt": [{"role": "user", "content": "ab"}]}, seed=0)] * 2
    try:
        episodes = player.play_in(ScriptedSession(RepeatingSession(), script, tokenizer), tasks)
    finally:
        player.close()
    check_played(episodes, script)
    counts = count_tokens(episodes)
    assert (counts["sampled_tokens"], counts["calls"]) == (2 * 2 * 200, 2)
    assert counts["prompt_tokens"] > 0 and counts["tool_tokens"] > 0
    assert [call.error for episode in episodes for call in episode.calls] == ["", ""]


def test_an_episode_that_leaves_the_script_is_refused(refused):
    script = [[ScriptedTurn(2, [9]), ScriptedTurn(2, [9])]]
    turn = PolicyTurn([5, 9], [0.0, 0.0], True, "")
    call = CallRecord(0, "look_up", {}, "no such shelf", "arguments")
    refused(lambda: check_played([Episode([1], [turn])], script))
    refused(lambda: check_played([Episode([1], [turn, turn], [[3]], calls=[call])], script))


def test_trl_gets_the_turns_of_the_rows_that_it_carries_on(refused):
    limits = []
    scripts = [[[ScriptedTurn(3, [9])], [ScriptedTurn(2, [8, 9]), ScriptedTurn(4, [9])]]]
    turns = ScriptedTurns(scripts, limits.append)
    turns.begin()
    generate = turns.wrap(lambda prompts: ([[5] * 4 for _ in prompts], [[-1.0] * 4 for _ in prompts]))
    assert generate([[1], [1]]) == ([[5, 5, 9], [8, 9]], [[-1.0] * 3, [-1.0] * 2])
    assert generate([[1]]) == ([[5, 5, 5, 9]], [[-1.0] * 4])
    assert limits == [[3, 2], [4]]
    refused(generate, [[1]])


def test_trl_tokens_are_counted_by_its_mask():
    assert count_trl_tokens([[1, 2], [1]], [[3, 4, 5], [6]], [[1, 0, 1], [1]]) == {
        "prompt_tokens": 3,
        "sampled_tokens": 3,
        "tool_tokens": 1,
    }


def test_clock_splits_an_update_without_gaps():
    clock = PhaseClock()
    clock.begin()

    def rollout():
        clock.timed("sampling", lambda: None)()
        clock.timed("scoring", lambda: None)()

    clock.timed("rollout", rollout)()
    clock.end(episodes=4)
    (update,) = clock.updates
    parts = [update[name] for name in ("sampling", "scoring", "measuring", "learning")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(update["seconds"])
    assert update["episodes"] == 4
    clock.end()
    assert clock.updates[1]["sampling"] == 0


def test_options_become_the_work_of_each_part():
    options = parse(["--batch", "8", "--micro-batch", "4", "--rounds", "2", "--updates", "3", "--tool-seconds", "0.5"])
    shape = comparison_shape(options)
    assert (shape.batch, shape.updates, shape.tool_seconds) == (8, 4, 0.5)
    shape = latency_shape(options)
    assert (shape.batch, shape.turns, shape.updates, shape.tool_seconds) == (64, 4, 5, 0.0)
    assert side_arguments(options, "trl", "lora") == [
        *("--method", "lora", "--kl", "0.04", "--engine", "transformers", "--weights", "bfloat16")
    ]
    ours = side_arguments(options, "align", "lora")
    assert ours[ours.index("--reuse-forward") + 1] == "1.0" and ours[ours.index("--workers") + 1] == "8"


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "6"], ["--batch", "20"], ["--latency-episodes", "62"], ["--rounds", "0"], ["--sides", "verl"]],
)
def test_options_that_do_not_fit_are_refused(arguments):
    with pytest.raises(SystemExit) as refusal:
        parse(arguments)
    assert refusal.value.code == 2


def test_sides_keep_their_order():
    assert parse(["--sides", "trl", "align"]).sides == ["align", "trl"]


def test_another_trl_is_refused(refused):
    refused(check_trl, {"trl": "1.12.0"})


def test_help_is_instant():
    code = "import sys; import benchmarks.episodes; sys.exit(any(name in sys.modules for name in ('trl', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
