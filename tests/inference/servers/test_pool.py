"""A pool of stand-ins for vLLM's server: who is asked what, and what becomes of one that hangs, dies or lies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.inference.protocol import Sampling
from align.inference.server_worker import LOAD
from align.inference.servers import dispatch
from align.inference.servers.pool import PoolEngine
from align.inference.servers.server_client import BadReply, EngineLost, WeightsChanged
from align.inference.sessions import open_session
from align.inference.trainer_engine import ask_each, returns
from align.inference.weights import checkpoint_weights
from tests.support.inference.fake_server import FakeServer, completion, info
from tests.support.inference.server_harness import PROMPTS, soon, wait_for

COMPLETIONS = "/v1/completions"
Opened = Callable[..., PoolEngine]


def asked(fake: FakeServer) -> list[Any]:
    return [body for path, body in fake.calls if path == COMPLETIONS]


def expected(sampling: Sampling, prompts: list[list[int]] = PROMPTS) -> list[list[list[int]]]:
    """Tokens that a stand-in answers with, whichever it is."""
    return [
        [
            completion({"seed": sampling.request_seed(index, sample), "max_tokens": sampling.max_tokens, "prompt": [1]})
            ["choices"][0]["token_ids"]
            for sample in range(sampling.n)
        ]
        for index in range(len(prompts))
    ]  # fmt: skip


def tokens(draws: Any) -> list[list[list[int]]]:
    return [[entry.token_ids for entry in some] for some in draws]


# ---- who is asked what ----


def test_answers_are_those_of_one_server_and_both_work(fakes: list[FakeServer], opened: Opened) -> None:
    pool, sampling, observations = opened(), Sampling(5, n=2, seed=3), []
    responses = pool.generate(PROMPTS, sampling, lambda done, total: observations.append((done, total)))
    assert tokens(responses) == expected(sampling)
    assert observations == [(done, 24) for done in range(1, 25)]
    assert [len(asked(fake)) for fake in fakes] > [0, 0]
    prompts = [{tuple(body["prompt"]) for body in asked(fake)} for fake in fakes]
    assert not prompts[0] & prompts[1]  # all samples of a prompt at one server, for its cached prefix
    assert pool.score_tokens(PROMPTS[:2], [[40, 41], [50]], 1.0) == [[-40.0, -41.0], [-50.0]]


def test_the_least_loaded_is_asked(fakes: list[FakeServer], opened: Opened) -> None:
    """Long prompts come first; while one server works on them, the short ones go to the other."""
    go = threading.Event()

    def wait(body: Any) -> Any:
        go.wait(10)
        return completion(body)

    for fake in fakes:
        fake.answers[COMPLETIONS] = wait
    pool = opened(batch_size=8)
    threading.Timer(0.5, go.set).start()
    prompts = [[7] * 50, *([[5, 6]] * 7)]
    pool.generate(prompts, Sampling(3))
    assert sorted(len(asked(fake)) for fake in fakes) == [1, 7]  # 53 tokens against 7 times 5
    load = [sum(len(body["prompt"]) + 3 for body in asked(fake)) for fake in fakes]
    assert sorted(load) == [35, 53]


def test_a_slow_server_is_asked_less(fakes: list[FakeServer], opened: Opened) -> None:
    def slow(body: Any) -> Any:
        time.sleep(0.3)
        return completion(body)

    fakes[0].answers[COMPLETIONS] = slow
    pool, sampling = opened(batch_size=1), Sampling(4, n=2)
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert len(asked(fakes[0])) < len(asked(fakes[1])) / 2


def test_no_server_has_more_under_way_than_it_decodes_at_once(fakes: list[FakeServer], opened: Opened) -> None:
    def slow(body: Any) -> Any:
        time.sleep(0.02)
        return completion(body)

    for fake in fakes:
        fake.answers[COMPLETIONS] = slow
    opened(batch_size=3).generate(PROMPTS * 2, Sampling(4))
    assert [fake.most_under_way for fake in fakes] == [3, 3]


# ---- weights ----


def test_every_server_reads_the_same_folder(fakes: list[FakeServer], opened: Opened, tiny_model: Path) -> None:
    pool = opened()
    folders: list[str] = []

    def load(path: str) -> None:
        assert (Path(path) / "READY").is_file()
        folders.append(Path(path).name)

    for fake in fakes:
        fake.load = load  # type: ignore[method-assign]
    pool.load_weights(checkpoint_weights(tiny_model))
    assert folders == ["step_2", "step_2"]  # step_1 were the checkpoint's, at the start
    assert [fake.paths() for fake in fakes] == [["/collective_rpc", "/reset_prefix_cache"]] * 2
    assert [folder.name for folder in pool.folder.path.iterdir()] == ["step_2"]
    assert [member.version for member in pool.members] == [2, 2]


def test_a_missing_weight_reaches_no_server(fakes: list[FakeServer], opened: Opened, tiny_model: Path) -> None:
    pool = opened()
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight"):
        pool.load_weights(pair for pair in checkpoint_weights(tiny_model) if pair[0] != "model.norm.weight")
    assert [fake.paths() for fake in fakes] == [[], []]
    assert pool.version == 1


def test_a_folder_that_none_can_read_is_an_error_at_once(
    fakes: list[FakeServer], opened: Opened, tiny_model: Path, warnings: list[str]
) -> None:
    pool = opened()
    for fake in fakes:
        fake.answers["/collective_rpc"] = lambda body, rpc=fake.rpc: (
            (500, {"error": {"message": "Repo id must be"}}) if body["method"] == LOAD else rpc(body)
        )
    with soon(), pytest.raises(BadReply, match=r"can it, under this very path\? runtime\.rollouts\.weights_folder"):
        pool.load_weights(checkpoint_weights(tiny_model))
    assert warnings == []


def test_server_lost_during_update_waits_for_weights(
    fakes: list[FakeServer], opened: Opened, tiny_model: Path, warnings: list[str]
) -> None:
    pool, sampling = opened(), Sampling(4)
    fakes[1].answers["/collective_rpc"] = fakes[1].drop
    fakes[1].answers["/server_info"] = fakes[1].drop  # and it stays away for a while
    pool.load_weights(checkpoint_weights(tiny_model))
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert asked(fakes[1]) == []
    assert "Server 2 of 2 is lost, for the first time: it is asked again until it answers." in warnings[0]
    fakes[1].calls.clear()
    fakes[1].answers |= {"/collective_rpc": fakes[1].rpc, "/server_info": lambda body: info()}
    wait_for(lambda: pool.members[1].ready)
    assert fakes[1].paths()[-2:] == ["/collective_rpc", "/reset_prefix_cache"]
    assert fakes[1].calls[-2][1]["kwargs"]["path"].endswith("step_2")
    assert returns(pool) == 1
    pool.generate(PROMPTS, sampling)
    assert asked(fakes[1])


# ---- weights that somebody else changed ----


def foreign_reload(fake: FakeServer) -> None:
    """What whoever has the key may ask of a server."""
    fake.rpc({"method": "reload_weights", "kwargs": {"weights_path": "/somewhere/else"}})


def test_a_foreign_reload_between_two_updates_ends_the_run(
    fakes: list[FakeServer], opened: Opened, tiny_model: Path
) -> None:
    pool = opened()
    pool.load_weights(checkpoint_weights(tiny_model))
    pool.generate(PROMPTS, Sampling(4))
    foreign_reload(fakes[1])
    with pytest.raises(WeightsChanged, match="does not hold the weights that this run gave it") as caught:
        pool.load_weights(checkpoint_weights(tiny_model))
    assert fakes[1].address in str(caught.value)
    with pytest.raises(WeightsChanged):  # nor is it asked any more
        pool.generate(PROMPTS, Sampling(4))


def test_a_foreign_reload_while_servers_answer_ends_the_run(fakes: list[FakeServer], opened: Opened) -> None:
    pool, reloaded = opened(), threading.Event()

    def answer(body: Any) -> Any:
        if not reloaded.is_set():
            reloaded.set()
            foreign_reload(fakes[0])
        return completion(body)

    fakes[0].answers[COMPLETIONS] = answer
    with pytest.raises(WeightsChanged, match="Nothing sampled since its weights were last compared can be trusted"):
        pool.generate(PROMPTS, Sampling(4))


def test_changed_values_without_a_load_fail_the_next_update(
    fakes: list[FakeServer], opened: Opened, tiny_model: Path
) -> None:
    pool = opened()
    fakes[0].holding["content"] = "something else"
    pool.generate(PROMPTS, Sampling(4))  # values are compared once an update
    with pytest.raises(WeightsChanged):
        pool.load_weights(checkpoint_weights(tiny_model))


def test_another_run_at_the_same_server_is_noticed(fakes: list[FakeServer], opened: Opened) -> None:
    first, second = opened(), opened()
    second.generate(PROMPTS, Sampling(4))
    with pytest.raises(WeightsChanged, match="or uses the server too"):
        first.generate(PROMPTS, Sampling(4))


def test_server_restarted_between_rounds_gets_weights_first(
    fakes: list[FakeServer], opened: Opened, warnings: list[str]
) -> None:
    pool, sampling = opened(), Sampling(4)
    fakes[1].holding = {"version": None, "digest": None, "loads": 0, "content": "the checkpoint's"}
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    wait_for(lambda: pool.members[1].ready)
    assert "it was restarted" in warnings[0]
    assert fakes[1].holding["version"] == pool.folder.name_of(1)
    assert returns(pool) == 1


def test_server_restarted_before_an_update_gets_weights(
    fakes: list[FakeServer], opened: Opened, tiny_model: Path, warnings: list[str]
) -> None:
    """Nothing was sampled since the last comparison, so nothing is spoiled."""
    pool = opened()
    pool.generate(PROMPTS, Sampling(4))
    fakes[1].holding = {"version": None, "digest": None, "loads": 0, "content": "the checkpoint's"}
    pool.load_weights(checkpoint_weights(tiny_model))
    wait_for(lambda: pool.members[1].ready)
    assert "it was restarted" in warnings[0]
    assert fakes[1].holding["version"] == fakes[0].holding["version"] == pool.folder.name_of(2)


# ---- servers that are lost ----


def hangs(fake: FakeServer) -> Callable[[Any], Any]:
    return fake.hang


def drops(fake: FakeServer) -> Callable[[Any], Any]:
    return fake.drop


def trickles(fake: FakeServer) -> Callable[[Any], Any]:
    return lambda body: ("trickled", completion(body))


def garbage(fake: FakeServer) -> Callable[[Any], Any]:
    return lambda body: b"<html>Bad gateway</html>"


def dies(fake: FakeServer) -> Callable[[Any], Any]:
    def die(body: Any) -> Any:
        fake.stop()
        raise ConnectionError

    return die


@pytest.mark.parametrize(
    ("fault", "label"),
    [
        (hangs, "did not answer /v1/completions within 1 s"),
        (trickles, "did not answer /v1/completions within 1 s"),
        (drops, "could not be asked for /v1/completions"),
        (dies, "could not be asked for /v1/completions"),
        (garbage, "it is not JSON"),
    ],
)
def test_another_answers_for_a_server_that_does_not(
    fakes: list[FakeServer], opened: Opened, warnings: list[str], fault: Callable[[FakeServer], Any], label: str
) -> None:
    pool, sampling = opened(restarts=0, timeout=1), Sampling(8, n=2)
    fakes[0].answers[COMPLETIONS] = fault(fakes[0])
    with soon(20):
        assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert len(warnings) == 1 and label in warnings[0] and fakes[0].address in warnings[0]
    assert "Server 1 of 2 is lost, for the first time: it is given up." in warnings[0]
    before = len(asked(fakes[0]))
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert len(asked(fakes[0])) == before


def test_one_bad_answer_is_no_loss(fakes: list[FakeServer], opened: Opened, warnings: list[str]) -> None:
    pool, sampling, wrong = opened(), Sampling(4), []

    def once(body: Any) -> Any:
        wrong.append(body)
        return b"?" if len(wrong) == 1 else completion(body)

    fakes[0].answers[COMPLETIONS] = once
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert warnings == []
    assert wrong[0] in asked(fakes[1])  # somebody else was asked


def test_a_question_that_nobody_answers(fakes: list[FakeServer], opened: Opened) -> None:
    """The request is at fault, not the servers: they are not given up one after the other."""
    pool = opened()
    for fake in fakes:
        fake.answers[COMPLETIONS] = lambda body: (
            (404, {"error": "too long"}) if body["prompt"] == PROMPTS[3] else completion(body)
        )
    with soon(), pytest.raises(BadReply, match="too long"):
        pool.generate(PROMPTS, Sampling(4))
    assert sum(body["prompt"] == PROMPTS[3] for fake in fakes for body in asked(fake)) == dispatch.BAD_REPLIES
    assert tokens(pool.generate(PROMPTS[:3], Sampling(4))) == expected(Sampling(4), PROMPTS[:3])


def test_end_of_a_round_does_not_stop_reading_weights(
    fakes: list[FakeServer], opened: Opened, warnings: list[str], tiny_model: Path
) -> None:
    pool, sampling, reading, gate = opened(timeout=20, restarts=3), Sampling(4), threading.Event(), threading.Event()
    pool.load_weights(checkpoint_weights(tiny_model))
    rpc = fakes[0].answers["/collective_rpc"]

    def slow_load(body: Any) -> Any:
        if body["method"] == LOAD:
            reading.set()
            gate.wait(20)
        return rpc(body)

    fakes[0].answers["/collective_rpc"] = slow_load
    fakes[0].answers[COMPLETIONS] = fakes[0].drop
    with soon(30):
        assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
        assert reading.wait(20)
        assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
        open_session(pool, 1.0).close()
        gate.set()
        wait_for(lambda: returns(pool) == 1)
    assert pool.members[0].losses == 1 and len(warnings) == 1


def test_all_are_lost(fakes: list[FakeServer], opened: Opened) -> None:
    pool = opened(restarts=1, timeout=1)
    for fake in fakes:
        fake.answers[COMPLETIONS] = fake.drop
    with soon(20), pytest.raises(EngineLost) as caught:
        pool.generate(PROMPTS, Sampling(4))
    assert all(fake.address in str(caught.value) for fake in fakes)
    assert "No server is left of 2: each was lost more than 1 times (runtime.rollouts.restarts)" in str(caught.value)
    with pytest.raises(EngineLost, match="No server is left"):
        pool.load_weights(iter(()))


def test_a_server_that_comes_back_is_asked_again(fakes: list[FakeServer], opened: Opened, warnings: list[str]) -> None:
    """Both are away for a moment: the round waits for them, and ends as if nothing had been."""
    pool, sampling, away = opened(timeout=10), Sampling(4), threading.Event()

    def gone(body: Any) -> Any:
        if not away.is_set():
            raise ConnectionError
        return completion(body)

    for fake in fakes:
        info = fake.answers["/server_info"]
        fake.answers[COMPLETIONS] = gone
        fake.answers["/server_info"] = lambda body, info=info: info(body) if away.is_set() else gone(body)
    threading.Timer(1.0, away.set).start()
    with soon(20):
        assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert returns(pool) >= 1
    assert {text.splitlines()[-1].partition(",")[0] for text in warnings} == {
        "Server 1 of 2 is lost",
        "Server 2 of 2 is lost",
    }


def test_one_that_comes_back_as_another_is_given_up(
    fakes: list[FakeServer], opened: Opened, warnings: list[str]
) -> None:
    pool, sampling = opened(timeout=2), Sampling(4)
    fakes[0].answers |= {COMPLETIONS: fakes[0].drop, "/server_info": lambda body: info(dtype="torch.bfloat16")}
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    wait_for(lambda: not pool.members[0].coming_back)
    wait_for(lambda: len(warnings) == 2)
    assert "dtype bfloat16 instead of float32" in warnings[1] and warnings[1].endswith("it is given up.")
    assert not pool.members[0].ready
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)


def test_a_silent_server_that_is_not_well_is_not_waited_for(
    fakes: list[FakeServer], opened: Opened, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers nothing at all, and the time it may take for an answer is long."""
    monkeypatch.setattr(dispatch, "HEALTH_SECONDS", 0.3)
    pool, sampling = opened(restarts=0), Sampling(4)
    fakes[0].answers |= {COMPLETIONS: fakes[0].hang, "/health": fakes[0].hang}
    with soon():
        assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert "did not say that it is well 3 times in a row (TimeoutError)" in warnings[0]


def test_a_silent_server_that_is_well_is_waited_for(
    fakes: list[FakeServer], opened: Opened, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "HEALTH_SECONDS", 0.2)

    def slow(body: Any) -> Any:
        time.sleep(2)
        return completion(body)

    fakes[0].answers[COMPLETIONS] = slow
    pool, sampling = opened(batch_size=1), Sampling(4)
    assert tokens(pool.generate(PROMPTS, sampling)) == expected(sampling)
    assert warnings == []
    assert "/health" in [path for path, _ in fakes[0].calls]


def test_each_is_asked_apart(fakes: list[FakeServer], opened: Opened, warnings: list[str]) -> None:
    pool = opened(restarts=0)
    assert ask_each(pool, lambda engine: len(engine.generate(PROMPTS[:2], Sampling(4)))) == [2, 2]
    assert [len(asked(fake)) for fake in fakes] == [2, 2]
    fakes[0].answers[COMPLETIONS] = fakes[0].drop
    assert ask_each(pool, lambda engine: len(engine.generate(PROMPTS[:2], Sampling(4)))) == [2]
    assert "Server 1 of 2 is lost" in warnings[0]
    assert ask_each(pool.members[1].engine, lambda engine: 5) == [5]
