"""Environments of the package verifiers: made of its own classes, and one of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.environments.environment import Action, EnvironmentSource
from align.environments.journal import Journal, JournaledEnvironment
from align.environments.results import BadCall, EnvironmentFailed, Step, ToolError
from align.environments.worker_pool import EnvironmentPool
from align.errors import UserError
from tests.support.environments.opened import open_block

pytest.importorskip("verifiers.v1", reason="the extra verifiers is not installed")

SUMS, GREETING = "verifiers-tasksets", "verifiers-greeting"


@pytest.fixture(autouse=True)
def _search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have verifiers find the environments of these tests, as packages at the top."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support" / "environments"))


def opened(name: str, **fields: Any) -> EnvironmentSource:
    return open_block({"verifiers": name} | fields)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_taskset_has_its_prompts_tools_and_rewards() -> None:
    source = opened(SUMS)
    function = source.tools[0]["function"]
    assert (function["name"], function["description"]) == ("add", "Add two numbers.")
    assert function["parameters"]["required"] == ["first", "second"]
    environment = source.make()
    assert environment.reset({"id": "1", "task": 3}) == [
        {"role": "system", "content": "Be right."},
        user("What is 3 + 1?"),
    ]
    assert environment.call("add", {"first": 3, "second": 1}) == "4"
    with pytest.raises(ToolError, match="ValueError: no negative numbers"):
        environment.call("add", {"first": -3, "second": 1})
    with pytest.raises(BadCall, match="add needs the argument 'second'"):
        environment.call("add", {"first": 3})
    assert environment.step("4") == Step([], True)
    scores = environment.score([])
    assert scores.total == 2.0
    assert scores.parts == {"right": 1.0, "calls": 2.0, "tool_messages": 2.0}
    environment.close()


def test_settings_are_those_of_the_taskset() -> None:
    environment = opened(SUMS, arguments={"count": 2}).make()
    with pytest.raises(EnvironmentFailed, match="has no task 3"):
        environment.reset({"task": 3})
    # Without a column ``task``, the row's id decides.
    prompts = {str(environment.reset({"id": str(number)})) for number in range(8)}
    assert len(prompts) == 2
    with pytest.raises(UserError, match=r"environment.verifiers .*verifiers cannot load it"):
        opened(SUMS, arguments={"cuont": 2})


def test_its_code_plays_the_user() -> None:
    environment = opened(GREETING).make()
    assert environment.reset({"task": 0}) == [user("Greet me.")]
    assert environment.step("Hm") == Step([user("Politely!")])
    assert environment.step("Hello") == Step([user("Again.")])
    assert environment.step("Hello") == Step([], True)
    assert environment.score([]).parts == {"politeness": 2.0}
    assert environment.score([]).total == 1.0


def test_an_episode_that_is_cut_short_or_stopped_is_scored() -> None:
    environment = opened(GREETING).make()
    environment.reset({"task": 0})
    environment.step("Hello")
    assert environment.score([]).total == 0.5
    environment.reset({"task": 0})
    assert environment.step("HELLO") == Step([], True)
    assert environment.score([]).total == 0.0


@pytest.mark.parametrize(
    ("message", "failure"),
    [
        ("nan", f"^{GREETING} returned nan as 'politeness'; return finite numbers"),
        ("inf", f"^{GREETING} returned inf as 'politeness'; return finite numbers"),
        ("tone=nan", f"^{GREETING} returned nan as 'tone'; return finite numbers"),
        ("std=1", f"^{GREETING} returned a score called 'std', which is the name of another metric"),
    ],
)
def test_scores_that_no_update_can_learn_from_fail_the_episode(message: str, failure: str) -> None:
    environment = opened(GREETING).make()
    environment.reset({"task": 0})
    environment.step(message)
    with pytest.raises(EnvironmentFailed, match=failure):
        environment.score([])


def test_names_of_scores_may_have_any_characters() -> None:
    environment = opened(GREETING).make()
    environment.reset({"task": 0})
    environment.step("judge/tone=0.5")
    assert environment.score([]).parts == {"politeness": 0.0, "judge/tone": 0.5}


def test_an_exception_of_its_code_fails_the_episode() -> None:
    environment = opened(GREETING).make()
    environment.reset({"task": 0})
    with pytest.raises(EnvironmentFailed, match=r"raised ValueError: the user is gone \(verifiers_greeting.py, line"):
        environment.step("explode")


def test_an_episode_is_played_again() -> None:
    environment = opened(GREETING).make()
    assert environment.restore({"task": 0}, [Action(None, "Hello", [user("Again.")])]) == 0
    assert environment.step("Hello").done
    environment.close()


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_episodes_run_in_a_pool_and_go_on_in_another(tmp_path: Path, isolation: Any) -> None:
    source = opened(SUMS)
    for run in range(2):
        pool = EnvironmentPool(source, workers=4, tool_seconds=100.0, isolation=isolation)
        environment = JournaledEnvironment(pool, Journal(tmp_path / "journal"), 0, {"task": 2})
        environment.reset().result(100)
        assert environment.call(0, 0, "add", {"first": 2, "second": 1}).result(100).text == "3"
        if run:
            assert environment.step(1, "3").result(100).done
            assert environment.score([]).result(100).parts["calls"] == 1.0
        pool.close()


def test_an_environment_that_is_not_installed_is_refused() -> None:
    with pytest.raises(UserError, match=r"environment.verifiers 'no-such-taskset': verifiers cannot load it"):
        opened("no-such-taskset")


def test_rows_are_made_of_tasks() -> None:
    from align.extensions.environments.verifiers import tasks

    assert list(tasks(SUMS, 2, first=3)) == [
        {"prompt": "What is 3 + 1?", "task": 3},
        {"prompt": "What is 4 + 1?", "task": 4},
    ]
    assert [record["task"] for record in itertools.islice(tasks(GREETING, 3), 3)] == [0, 1, 2]


WORDS = ("apple", "house", "river", "stone", "cloud")


@pytest.fixture(scope="module")
def word_lists(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The corpus and the tagger that TextArena's word games read, which NLTK would load from the network, once."""
    pytest.importorskip("textarena", reason="textarena is not installed")
    import nltk

    folder = tmp_path_factory.mktemp("nltk")
    corpus, tagger = folder / "corpora" / "words", folder / "taggers" / "averaged_perceptron_tagger_eng"
    corpus.mkdir(parents=True)
    tagger.mkdir(parents=True)
    for name in ("en", "en-basic", "README"):
        (corpus / name).write_text("\n".join(WORDS) + "\n")
    contents = {"weights": {}, "tagdict": dict.fromkeys(WORDS, "NN"), "classes": ["NN"]}
    for part, content in contents.items():
        (tagger / f"{tagger.name}.{part}.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder)])
        patch.setattr(nltk, "download", lambda *arguments, **options: True)
        yield


@pytest.mark.usefixtures("word_lists")
@pytest.mark.parametrize("game", ["Hangman-v0", "Wordle-v0"])
def test_text_games_of_theirs_are_played_to_the_end(game: str) -> None:
    environment = opened("textarena", arguments={"game": game}).make()
    first = environment.reset({"task": 1})
    assert first is not None and first[0]["role"] == "system" and "word" in str(first[-1])
    assert "invalid move" in str(environment.step("I do not know.").messages)
    # One of the words is the secret one; neither game ends before five wrong guesses.
    steps = list(itertools.takewhile(lambda step: not step.done, (environment.step(f"[{word}]") for word in WORDS)))
    assert len(steps) < len(WORDS)
    assert environment.score([]).total == 1.0
    environment.close()
