"""The program in an answer, and the processes that a program's calls alternate between."""

from __future__ import annotations

import time
from typing import Any

import pytest

from align.verifiers.code import find_program
from align.verifiers.sandbox.session import Replicas, SeparateObjects

OTHER = "```\n6\n```"


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("f = 1", "f = 1"),
        ("```python\nf = 1\n```", "f = 1"),
        ("```PY\nf = 1", "f = 1"),
        ("~~~python3\nf = 1\n~~~", "f = 1"),
        ("```\nf = 1\n```", "f = 1"),
        ("Here: ```python\nf = 1\n```", "f = 1"),
        ("```python\r\nf = 1\r\ng = 2\r\n```", "f = 1\ng = 2"),
        (f"```python\nf = 1\n```\n{OTHER}", "f = 1"),
        (f"{OTHER}\n```text\n7\n```", "6"),
        ("```bash\nls\n```\n```python\nf = 1\n```", "f = 1"),
        ("```python\nf = 0\n```\n```python\nf = 1\n```", "f = 1"),
        ("1. So:\n   ```python\n   if f:\n       f = 1\n   ```", "if f:\n    f = 1"),
        ("Use ```f``` here\n```python\nf = 1\n```", "f = 1"),
        ("````python\nf = '''\n```\n'''\n````", "f = '''\n```\n'''"),
        ("```python\n```", ""),
        ("<think>```python\nf = 0\n```</think>No.", "No."),
        ("<think>```python\nf = 0\n```", ""),
    ],
)
def test_program_is_the_last_block_of_python(answer: str, program: str) -> None:
    assert find_program(answer) == program


@pytest.mark.parametrize("piece", ["~~~ ", "```", "```python\n", "~~~\n```\n", "1. ```text\n"])
def test_long_answers_take_linear_time(piece: str) -> None:
    started = time.process_time()
    find_program(piece * 20_000)
    assert time.process_time() - started < 5


def test_block_with_the_entry_point_is_the_program() -> None:
    assert find_program("```python\ndef f(): 1\n```\n```python\nf()\n```", "f") == "def f(): 1"


class EchoSession:
    """A process that returns an object with the next number for each call, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> bool:
        self.requests.append(message)
        return True

    def receive(self) -> dict[str, Any]:
        return {"value": {"list": [{"handle": len(self.requests) - 1}]}}


def test_calls_alternate_and_objects_stay_in_their_process() -> None:
    sessions = [EchoSession(), EchoSession()]
    replicas = Replicas(sessions)  # type: ignore[arg-type]
    numbers = []
    for _ in range(4):
        _, reply = replicas.ask({"name": "f", "arguments": {"list": []}})
        assert reply is not None
        numbers.append(reply["value"]["list"][0]["handle"])
    assert numbers == [0, 1, 2, 3]
    assert [len(session.requests) for session in sessions] == [2, 2]
    session, _ = replicas.ask({"handle": 3, "attribute": "g"})
    assert session is sessions[1] and sessions[1].requests[-1]["handle"] == 1
    with pytest.raises(SeparateObjects):
        replicas.ask({"name": "f", "arguments": {"list": [{"handle": 0}, {"handle": 1}]}})
