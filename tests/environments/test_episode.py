"""An episode as one response: its tokens, which of them the policy sampled, and its way through JSON."""

import json
import math

from align.environments.episode import CallRecord, Episode, PolicyTurn, failed_episode

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


def test_an_episode_that_never_began_has_a_token_that_says_nothing():
    episode = failed_episode([], 7, "reset: no such table")
    assert (episode.prompt_ids, episode.token_ids, episode.mask, episode.finished) == ([7], [7], [True], False)
    assert math.isnan(episode.logprobs[0]) and math.isnan(episode.score)
    restored = Episode.from_json(json.loads(json.dumps(episode.to_json())))
    assert math.isnan(restored.score) and restored.failure == "reset: no such table"
