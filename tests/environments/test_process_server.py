"""Requests to the process of an episode, as they are written and read."""

from __future__ import annotations

from align.environments.environment import Action
from align.environments.process_server import decode_request, encode_request


def test_actions_to_repeat_are_decoded_as_actions() -> None:
    row, state = {"goal": 6}, {"count": 3}
    actions = [Action("add", {"number": 3}, "The count is 3."), Action(None, "next", [])]
    method, inputs = decode_request(encode_request("restore", (row, actions, state)))
    assert (method, inputs) == ("restore", [row, actions, state])
    assert inputs[1][0].name == "add"
    # The inputs of other methods are JSON as it is.
    assert decode_request(encode_request("call", ("add", {"number": 3}))) == ("call", ["add", {"number": 3}])
