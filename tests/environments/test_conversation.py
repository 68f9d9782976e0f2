"""Episodes as rows: the beginning as the prompt, the turns and what was told between them as the answer."""

from __future__ import annotations

import json
from typing import Any

from align.data.rows import assistant, read_rows, user, write_rows
from align.environments.conversation import answer_of, dialogue, opening, prompt_of
from align.environments.episode import CallRecord, Episode, PolicyTurn, failed_episode

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


def test_an_answer_begins_after_the_examples_and_ends_with_the_last_turn() -> None:
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


def test_a_malformed_call_is_the_text_that_was_sampled_and_may_be_excluded() -> None:
    told = {"role": "tool", "content": "Error: A tool call is no valid JSON."}
    record = CallRecord(0, "", {}, "A tool call is no valid JSON.", "malformed")
    played = episode(user("?"), called(), told, assistant("x"), texts=["<tool_call>{", "x"], calls=[record])
    assert answer_of(played) == [assistant("<tool_call>{"), told, assistant("x")]
    assert answer_of(played, marks_malformed=True)[0] == assistant("<tool_call>{") | {"train": False}


def test_a_server_reads_what_answers_a_malformed_call_from_a_user() -> None:
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
