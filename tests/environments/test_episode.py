"""An episode: its tokens, its conversation, and its rows."""

from __future__ import annotations

import json
import math
from typing import Any

from align.data.rows import assistant, read_rows, user, write_rows
from align.environments.episode import (
    CallRecord,
    Episode,
    PolicyTurn,
    answer_of,
    dialogue,
    failed_episode,
    opening,
    prompt_of,
)

EPISODE = Episode(
    prompt_ids=[1, 2],
    turns=[PolicyTurn([10, 11], [-0.5, -0.25], True, "call"), PolicyTurn([12], [-1.0], True, "done")],
    observations=[[20, 21, 22]],
    messages=[{"role": "user", "content": "?"}],
    calls=[CallRecord(0, "add", {"a": 1}, "2", "", 0.5)],
    score=0.1,
    parts={"right": 0.1},
    turn_scores=[0.0, 0.1],
)


def test_turns_and_observations_stand_in_one_line():
    assert EPISODE.token_ids == [10, 11, 20, 21, 22, 12]
    assert EPISODE.mask == [True, True, False, False, False, True]
    assert EPISODE.logprobs == [-0.5, -0.25, 0.0, 0.0, 0.0, -1.0]
    assert EPISODE.length == 6
    assert EPISODE.context_ids() == [1, 2, 10, 11, 20, 21, 22, 12]
    assert EPISODE.text == "done"


def test_tokens_of_the_environment_have_the_weights_before_them():
    turns = [PolicyTurn([10, 11], [-0.5, -0.25], True, "call", 3), PolicyTurn([12], [-1.0], True, "done", 4)]
    assert Episode([1], turns, [[20, 21, 22]]).weights_updates == [3, 3, 3, 3, 3, 4]


def test_json_changes_nothing():
    assert Episode.from_json(json.loads(json.dumps(EPISODE.to_json()))) == EPISODE


def test_failed_reset_has_a_masked_token():
    episode = failed_episode([], 7, "reset: no such table")
    assert (episode.prompt_ids, episode.token_ids, episode.mask, episode.finished) == ([7], [7], [True], False)
    assert math.isnan(episode.logprobs[0]) and math.isnan(episode.score)
    restored = Episode.from_json(json.loads(json.dumps(episode.to_json())))
    assert math.isnan(restored.score) and restored.failure == "reset: no such table"


ADD = {"name": "add", "arguments": {"number": 1, "base": None}}
EXAMPLE = {"role": "assistant", "content": "", "tool_calls": [ADD]}
RESULT = {"role": "tool", "content": "2", "name": "add"}


def turn(text: str) -> PolicyTurn:
    return PolicyTurn([1], [-0.5], True, text)


def episode(*messages: dict[str, Any], texts: list[str], calls: list[CallRecord] | None = None) -> Episode:
    return Episode([1], [turn(text) for text in texts], messages=list(messages), calls=calls or [])


def called(*names: str, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": name, "arguments": {}} | more for name in names],
    }


def test_answer_has_turns_after_examples() -> None:
    played = episode(
        user("1+1?"), EXAMPLE, RESULT, user("and 2?"), called("add"), RESULT, assistant("3"), user("bye"),
        texts=["!add", "3"],
    )  # fmt: skip
    assert opening(played) == [user("1+1?"), EXAMPLE, RESULT, user("and 2?")]
    assert [message["role"] for message in prompt_of(played)] == ["user", "assistant", "tool", "user"]
    answer = answer_of(played)
    assert [message["role"] for message in answer] == ["assistant", "tool", "assistant"]
    assert answer[-1] == assistant("3")
    assert dialogue(played) == [*prompt_of(played), *answer, user("bye")]


def test_calls_are_json_text_with_ids_that_their_results_name() -> None:
    played = episode(
        user("?"), called("a", "b"), RESULT, RESULT | {"content": "4"}, called("c", id="own"), RESULT, assistant("."),
        texts=["!a!b", "!c", "."],
    )  # fmt: skip
    first, one, two, second, three, _ = answer_of(played)
    calls = json.loads(first["tool_calls"])
    assert [call["function"]["name"] for call in calls] == ["a", "b"]
    assert [one["tool_call_id"], two["tool_call_id"]] == [call["id"] for call in calls]
    assert one["content"] == "2" and two["content"] == "4"
    assert json.loads(second["tool_calls"])[0]["id"] == three["tool_call_id"] == "own"


def test_ids_that_a_server_drew_are_numbered_anew_in_rows() -> None:
    def played(id: str) -> Episode:
        talk = episode(user("?"), called("a", id=id), RESULT, assistant("."), texts=["", "."])
        talk.turns = [PolicyTurn([], [], True, "") for _ in talk.turns]
        return talk

    row = answer_of(played("call_x7"))
    assert row == answer_of(played("call_q2"))
    assert json.loads(row[0]["tool_calls"])[0]["id"] == row[1]["tool_call_id"] == "call00000"
    # The server reads its own ids.
    spoken = dialogue(played("call_x7"))
    assert json.loads(spoken[1]["tool_calls"])[0]["id"] == spoken[2]["tool_call_id"] == "call_x7"


def test_arguments_keep_their_nulls() -> None:
    (call,) = json.loads(prompt_of(episode(EXAMPLE, user("?"), assistant("x"), texts=["x"]))[0]["tool_calls"])
    assert call["function"]["arguments"] == ADD["arguments"]


def test_malformed_call_is_stored_as_sampled_text() -> None:
    told = {"role": "tool", "content": "Error: A tool call is no valid JSON."}
    record = CallRecord(0, "", {}, "A tool call is no valid JSON.", "malformed")
    played = episode(user("?"), called(), told, assistant("x"), texts=["<tool_call>{", "x"], calls=[record])
    assert answer_of(played) == [assistant("<tool_call>{"), told, assistant("x")]
    assert answer_of(played, marks_malformed=True)[0] == assistant("<tool_call>{") | {"train": False}


def test_server_reads_error_of_malformed_call_as_user() -> None:
    told = {"role": "tool", "content": "Error: A tool call is no valid JSON."}
    record = CallRecord(0, "", {}, "A tool call is no valid JSON.", "malformed")
    played = episode(user("?"), called(), told, assistant("x"), texts=["a({", "x"], calls=[record])
    played.turns = [PolicyTurn([], [], True, turn.text) for turn in played.turns]
    assert answer_of(played) == [assistant("a({"), user(told["content"]), assistant("x")]
    assert dialogue(played) == [user("?"), *answer_of(played)]


def test_an_episode_that_never_began_has_no_answer() -> None:
    failed = failed_episode([1], 9, "reset: no")
    failed.messages = [user("?")]
    assert answer_of(failed) == [] and prompt_of(failed) == [user("?")]


def test_rows_of_episodes_come_back_from_their_file(tmp_path: Any) -> None:
    played = episode(user("?"), called("add"), RESULT, assistant("3"), texts=["!add", "3"])
    row = {"id": "0", "source": "t", "prompt": prompt_of(played), "checks": "", "completion": answer_of(played)}
    write_rows(tmp_path / "train.parquet", [row])
    assert read_rows(tmp_path / "train.parquet") == [row]
