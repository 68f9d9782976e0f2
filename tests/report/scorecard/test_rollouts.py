"""Episodes as conversations: turns, calls and results in their places, ends, failures, and bounds of hostile ones."""

import json

from align.environments.episode import describe_episode
from align.environments.journal import CallResult
from align.environments.results import Scores, Step
from align.report.scorecard.rollouts import (
    MAX_EPISODE,
    MAX_RESULT,
    episode_view,
    is_episode,
    read_episodes,
    read_lines,
)
from align.report.scorecard.samples import page_samples
from tests.support.report.example_episodes import episode_line, play

ASK = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "1+1?"}]
SHOWN = [  # an example in the prompt, which the policy did not write
    {"role": "user", "content": "0+0?"},
    {"role": "assistant", "content": "0"},
    {"role": "user", "content": "1+1?"},
]
MALFORMED = "<tool_call>{oops</tool_call>"


def call(**arguments):
    return '<tool_call>{"name": "add", "arguments": ' + json.dumps(arguments) + "}</tool_call>"


def view(script, prompt=ASK, more=(), **options):
    return episode_view(json.loads(json.dumps(episode_line(play(prompt, script, **options), prompt))) | dict(more))


def test_calls_stand_in_their_turn_with_their_results():
    script = ["Wait. " + call(a=1) + call(a=2), CallResult("one", seconds=0.5), CallResult("no", "raised"), "2"]
    shown = view([*script, Scores(1.25, {}, [0.25, 1.0])])
    assert shown["prompt"] == [{"role": "system", "text": "Be exact."}, {"role": "user", "text": "1+1?"}]
    first, last = shown["entries"]
    assert (first["role"], first["note"], first["policy"]) == ("assistant", "turn 1 · score 0.250", True)
    assert first["text"].strip() == "Wait."
    assert first["calls"] == [
        {"name": "add", "arguments": '{"a": 1}', "result": "one", "note": "0.500 s", "ok": True},
        {"name": "add", "arguments": '{"a": 2}', "result": "no", "note": "✗ the tool raised", "ok": False},
    ]
    assert (last["text"], last["note"], last["calls"]) == ("2", "turn 2 · score 1.00", [])
    assert shown["facts"] == ["2 turns", "2 calls", "1 × the tool raised"]
    assert (shown["end"], shown["ok"]) == ("■ ended by the model or its environment", True)


def test_what_the_environment_says_is_no_turn_of_the_policy():
    said = Step([{"role": "user", "content": "and 2+2?"}, {"role": "tool", "content": "a hint"}])
    shown = view(["2", said, "4", Step([], True), Scores(1.0, {})], SHOWN, has_step=True)
    assert [turn["text"] for turn in shown["prompt"]] == ["0+0?", "0", "1+1?"]
    roles = [(entry["role"], entry["text"], entry["policy"], entry["note"]) for entry in shown["entries"]]
    assert roles == [
        ("assistant", "2", True, "turn 1"),
        ("user", "and 2+2?", False, ""),
        ("tool", "a hint", False, ""),
        ("assistant", "4", True, "turn 2"),
    ]


def test_a_malformed_call_is_marked():
    entry = view([MALFORMED, "2", Scores(0.0, {})])["entries"][0]
    (malformed,) = entry["calls"]
    assert (malformed["name"], malformed["arguments"], malformed["ok"]) == ("", "", False)
    assert malformed["note"] == "✗ malformed call"
    assert malformed["result"]


def test_calls_that_nobody_made_are_named():
    shown = view([MALFORMED + call(a=1), Scores(0.0, {})], max_turns=1)
    assert [each["note"] for each in shown["entries"][0]["calls"]] == ["✗ malformed call", "✗ not run"]
    assert (shown["end"], shown["ok"]) == ("✂ cut at max_turns", False)


def test_a_failure_has_its_reason_and_no_result():
    shown = view([call(a=1) + call(a=2), CallResult("one"), ValueError("the machine fell over")])
    assert [each["note"] for each in shown["entries"][0]["calls"]] == ["", "✗ no result"]
    assert shown["end"] == "✗ the environment failed: the machine fell over"


def test_a_failure_before_the_first_turn_has_a_prompt_alone():
    line = episode_line(play(SHOWN, [ValueError("no room")]), SHOWN)
    assert (line["turns"], line["tokens"]) == (1, 1)  # a token that stands for the response
    shown = episode_view(line)
    assert [turn["text"] for turn in shown["prompt"]] == ["0+0?", "0", "1+1?"]
    assert (shown["entries"], shown["facts"]) == ([], ["0 turns", "0 calls"])
    answer = page_samples([], None, {"ppo": [line | {"messages": []}]})["items"][0]
    assert [turn["text"] for turn in answer["prompt"]] == ["0+0?", "0", "1+1?"]  # those of the row
    assert answer["score"] == {"ppo": None}


def test_a_megabyte_is_cut_and_counted():
    million, sampled = "x" * 1_000_000, "x" * 100_000  # the stand-in has a token for each character that was sampled
    shown = view([sampled + call(a=sampled), CallResult(million), "2", Scores(0.0, {})])
    first = shown["entries"][0]
    assert first["text"].endswith("… (94,000 more characters)")
    assert len(first["calls"][0]["arguments"]) < MAX_RESULT + 50
    assert first["calls"][0]["result"].endswith("… (997,000 more characters)")
    assert len(json.dumps(shown)) < MAX_EPISODE


def test_many_turns_calls_and_messages_are_bounded():
    prompt = [{"role": "user", "content": "y" * 5_000}] * 1_000
    many = view([call(a=1) * 900, *[CallResult("r")] * 900, "2", Scores(0.0, {})], prompt)
    assert many["entries"][0]["left_out"] == f"… {900 - len(many['entries'][0]['calls'])} more calls, left out for size"
    assert many["left_out"] == "… 1 more message, left out for size"
    assert many["prompt"][-1]["text"] == f"… {1_000 - len(many['prompt']) + 1} more messages, left out for size"
    script = [part for _ in range(2_000) for part in ("", Step([{"role": "user", "content": ""}]))]
    long = view([*script, "2", Step([], True), Scores(0.0, {})], has_step=True, max_turns=3_000)
    assert len(long["entries"]) < 500
    assert long["left_out"] == f"… {4_001 - len(long['entries']):,} more messages, left out for size"
    for shown in (many, long):
        assert len(json.dumps(shown, ensure_ascii=False)) < 4 * MAX_EPISODE


def test_damaged_and_foreign_lines_are_no_episodes_or_harmless(tmp_path):
    line = episode_line(play(ASK, ["2", Scores(1.0, {})]), ASK)
    assert is_episode(line)
    for damage in ({"messages": None}, {"messages": ["x"]}, {"calls": 3}, {"calls": [3]}):
        assert not is_episode(line | damage)
    harmless = {"turns": "many", "turn_scores": 5, "stop": None, "failure": None, "calls": [{}], "sampled": "no"}
    page = page_samples([], None, {"ppo": [line | harmless]})
    assert "s" not in page["items"][0]["answers"]["ppo"][0]["heat"]
    path = tmp_path / "samples.jsonl"
    path.write_text('{"prompt": "p", "response": ' + "[" * 100_000 + "\n" + json.dumps(line) + "\n", encoding="utf-8")
    assert list(read_lines(path, {"prompt", "response"})) == [line]


def test_episodes_of_sampling_stage_show_scores(tmp_path):
    episodes = [play(ASK, [call(a=1), CallResult("one"), str(answer), Scores(1.0, {})]) for answer in (2, 3)]
    line = {"split": "train", "id": "r1", "prompt": ASK, "scores": [1.0, None]}
    line |= {"texts": ["2", "3"], "episodes": [describe_episode(episode) for episode in episodes]}
    path = tmp_path / "samples.jsonl"
    damaged = [line | {"episodes": 3}, line | {"scores": 3}, line | {"episodes": [3]}, {"prompt": "p", "texts": ["x"]}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [line, *damaged]), encoding="utf-8")
    (item,) = page_samples([], None, {"sample": read_episodes(path)})["items"]
    assert (item["source"], item["score"]) == ("train r1", {"sample 1": 1.0, "sample 2": None})
    episode = item["answers"]["sample 1"][0]["episode"]
    assert [entry["text"].strip() for entry in episode["entries"]] == ["", "2"]
    assert [shown["result"] for shown in episode["entries"][0]["calls"]] == ["one"]
    assert episode["facts"] == ["2 turns", "1 call"]
    assert read_episodes(tmp_path / "missing.jsonl") == []


def test_episode_sample_has_scores_and_token_marks():
    script = [call(a=1), CallResult("one"), "2", Scores(1.0, {"form": 0.25})]
    line = episode_line(play(ASK, script), ASK, score_form=0.25)
    item = page_samples([], None, {"ppo": [line]})["items"][0]
    (answer,) = item["answers"]["ppo"]
    assert (item["source"], item["score"], answer["scores"]) == ("update 1", {"ppo": 1.0}, {"score_form": 0.25})
    tokens = zip(answer["heat"]["t"], answer["heat"]["s"], strict=True)
    assert "".join(text for text, sampled in tokens if not sampled) == "<one>"
    assert answer["text"] == ""  # it is part of the conversation
    plain = {name: line[name] for name in ("update", "prompt", "response", "score", "tokens", "finished", "by_token")}
    (response,) = page_samples([], None, {"ppo": [plain]})["items"][0]["answers"]["ppo"]
    assert set(response) == {"tokens", "finished", "text", "heat"}
    assert set(response["heat"]) == {"t", "k", "v", "a"}


def test_thoughts_of_turns_are_apart_from_their_text():
    messages = [
        {"role": "user", "content": "<think>q</think>?"},
        {"role": "assistant", "content": "<think>a</think>yes"},
    ]
    view = episode_view({"messages": messages, "calls": [], "turns": 1, "stop": "finished"})
    assert view["prompt"][0]["text"] == "<think>q</think>?"
    assert (view["entries"][0]["thought"], view["entries"][0]["text"]) == ("<think>a</think>", "yes")
