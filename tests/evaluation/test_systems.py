"""Ways to use a checkpoint without training it: what they add to a conversation, what they sample, what is refused."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from align.config.stages.evaluate import BaselineConfig
from align.evaluation.answers import Example, ResponseSet, SystemResponses, Turn
from align.evaluation.evaluator import Evaluation
from align.evaluation.participants import NO_ANSWER, Respondent
from align.evaluation.scoring import select_best
from align.evaluation.systems import Policy, best_of_kl, example_identities, make_systems
from align.inference.protocol import Response, Sampling
from align.store.artifacts import Artifact, Kind


class Spelled:
    """A tokenizer that shows a conversation as its messages' sizes."""

    def apply_chat_template(self, messages, **options):
        return [len(message["content"]) for message in messages]


def systems(tmp_path, **baselines):
    policies = [Policy(name, tmp_path, f"key {name}", Spelled()) for name in ("model", "sft")]
    configs = {name: BaselineConfig(**block) for name, block in baselines.items()}
    return {system.name: system for system in make_systems(policies, "model", configs, tmp_path)}


def turn(role, content):
    return {"role": role, "content": content}


def test_roles_and_keys(tmp_path):
    compared = systems(tmp_path, asked={"of": "model", "system": "Be brief."}, best={"of": "sft", "best_of": 4})
    assert {name: first.info.role for name, first in compared.items()} == {
        "model": "base", "sft": "checkpoint", "asked": "prompted", "best": "best_of",
    }  # fmt: skip
    assert compared["model"].info.key == "key model"
    second = systems(tmp_path, asked={"of": "model", "system": "Be long."}, best={"of": "sft", "best_of": 8})
    assert compared["asked"].info.key != second["asked"].info.key
    assert compared["best"].info.key != second["best"].info.key


def test_a_prompted_conversation(refused, tmp_path):
    compared = systems(tmp_path, asked={"of": "model", "system": "S", "shots": 2})["asked"]
    shots = [Example("q1", "a1"), Example("q2", "a2"), Example("q3", "a3")]
    requests = [turn("system", "own"), turn("user", "hello")]
    assert compared.conversation(requests, shots) == [
        turn("system", "S\n\nown"),
        turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2"), turn("assistant", "a2"),
        turn("user", "hello"),
    ]  # fmt: skip
    assert requests == [turn("system", "own"), turn("user", "hello")]  # as it was
    refused(lambda: compared.conversation(requests, shots[:1]))
    with_more = replace(compared, fallback=tuple(shots[1:]))
    assert [m["content"] for m in with_more.conversation(requests, shots[:1])][1:5] == ["q2", "a2", "q3", "a3"]
    assert [m["content"] for m in with_more.conversation(requests, shots)][1:5] == ["q1", "a1", "q2", "a2"]


def test_examples_follow_conversation_system_message(tmp_path):
    compared = systems(tmp_path, asked={"of": "model", "shots": 1})["asked"]
    messages = compared.conversation([turn("system", "own"), turn("user", "hello")], [Example("q", "a")])
    assert [message["content"] for message in messages] == ["own", "q", "a", "hello"]


def test_a_checkpoint_as_it_is_adds_nothing(tmp_path):
    compared = systems(tmp_path)["sft"]
    assert compared.conversation([turn("user", "x")], [Example("q", "a")]) == [turn("user", "x")]
    assert compared.sampling(Sampling(8, 0.0)) == Sampling(8, 0.0)


def test_examples_of_a_file(refused, tmp_path):
    file = tmp_path / "shots.jsonl"
    lines = [{"question": "q1", "answer": "a1"}, {"prompt": "q2", "completion": "a2"}]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    block = {"of": "sft", "shots": 2, "examples": "shots.jsonl"}
    compared = systems(tmp_path, asked=block)["asked"]
    assert [m["content"] for m in compared.conversation([turn("user", "x")])] == ["q1", "a1", "q2", "a2", "x"]
    digest = example_identities(BaselineConfig(**block), tmp_path)["examples"]
    refused(systems, tmp_path, asked=block | {"shots": 3})
    file.write_text('{"question": "q1", "answer": "a1"}\n{"question": "q2"}\n')
    assert example_identities(BaselineConfig(**block), tmp_path)["examples"] != digest
    refused(systems, tmp_path, asked=block)
    file.unlink()
    refused(lambda: example_identities(BaselineConfig(**block), tmp_path))


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"best_of": 4, "shots": 1},
        {"best_of": 4, "sample_seed": 1},
        {"system": "S", "examples": "x.jsonl"},
        {"best_off": 2},
    ],
)
def test_what_is_refused(refused, block):
    refused(BaselineConfig, of="sft", **block)


def test_best_of_n_samples_n_times_and_never_greedily(tmp_path):
    compared = systems(tmp_path, best={"of": "sft", "best_of": 4, "temperature": 0.7})["best"]
    sampling = compared.sampling(Sampling(8, 0.0, n=2, seed=5))
    assert (sampling.n, sampling.temperature, sampling.max_tokens, sampling.seed) == (8, 0.7, 8, 5)
    assert compared.sampling(Sampling(8, 0.3)).temperature == 0.3


def test_sampled_again_changes_seeds_and_nothing_else(tmp_path):
    compared = systems(tmp_path, again={"of": "sft", "sample_seed": 1}, third={"of": "sft", "sample_seed": 2})
    sampling = Sampling(8, 0.9, n=3, seed=5, seeds=(4, 4))
    again, third = (compared[name].sampling(sampling) for name in ("again", "third"))
    assert (again.n, again.temperature, again.max_tokens) == (3, 0.9, 8)
    assert len({sampling.seed, again.seed, third.seed}) == 3
    assert again.request_seed(0, 0) != sampling.request_seed(0, 0)
    assert compared["again"].info.role == "again" and compared["again"].is_plain


def test_best_of_kl_by_hand():
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(math.log(4) - 0.75)


class Likes:
    """A bench whose reward model likes what the text says."""

    def __init__(self):
        self.asked = []

    def reward_scores(self, prompts, answers, finished, *, tools=None):
        self.asked.append((prompts, answers, finished, tools))
        return [float(text) for text in answers]


def test_the_best_of_each_group_is_kept():
    def sample(text, earlier=()):
        return [*earlier, Turn([turn("user", "p")], Response([1], [-1.0], text != "0", text))]

    earlier = [Turn([turn("user", "first")], Response([1], [-1.0], True, "9"))]
    answers = [[sample("1"), sample("3", earlier), sample("2"), sample("0")], [sample(str(i)) for i in (5, 5, 4, 6)]]
    bench = Likes()
    best = select_best(answers, 2, bench)
    assert [[entry[-1].response.text for entry in samples] for samples in best] == [["3", "2"], ["5", "6"]]
    assert best[0][0][0].response.text == "9"  # the whole conversation
    assert best[1][0] is answers[1][0]  # the first of equal ones
    assert bench.asked[0][2] == [True, True, True, False, True, True, True, True]  # cut-off answers are told
    assert bench.asked[0][3] is None
    assert select_best(answers, 2, bench, ["[]", None]) == best
    assert bench.asked[1][3] == ["[]"] * 4 + [None] * 4


def test_a_score_that_is_no_number_loses_to_any_other():
    answers = [[[Turn([turn("user", "p")], Response([1], [-1.0], True, text))] for text in ("nan", "-3", "nan", "nan")]]
    best = select_best(answers, 2, Likes())
    assert [samples[-1].response.text for samples in best[0]] == ["-3", "nan"]
    assert best[0][1] is answers[0][2]


class Caller:
    """A reward model that likes a call where tools are offered, and plain text elsewhere."""

    def score(self, prompts, answers, finished, tools):
        return [
            float(("call" in answer) == (offered is not None)) for answer, offered in zip(answers, tools, strict=True)
        ]


def test_best_of_n_is_chosen_and_cached_with_the_rows_tools(tmp_path):
    artifact = Artifact("rm", Kind.REWARD, tmp_path, {"key": "k"})
    context = SimpleNamespace(inputs={"reward": artifact}, checkpoints=tmp_path, cache=None, warn=print, seed=0)
    sides = [[Turn([turn("user", "q")], Response([1], [0.0], True, text))] for text in ("plain", "call")]

    def evaluation(row):
        best = SimpleNamespace(name="best", info=SimpleNamespace(role="best_of", best_of=2))
        plan = SimpleNamespace(systems=[best], rows=[row], reference="sft", base=None, precision="float32")
        prepared = Evaluation(context, plan)
        prepared.scoring._models["reward"] = Caller()
        responses = SystemResponses(prompt_set={"best": ResponseSet("e", [[sample[-1].response for sample in sides]])})
        prepared._select_best(responses)
        return prepared, responses.prompt_set["best"].responses[0][0].text

    row = {"id": "1", "source": "s", "prompt": [turn("user", "q")]}
    assert evaluation(row)[1] == "plain"
    assert evaluation(row | {"tools": "[{}]"})[1] == "call"  # another entry of the cache than the one without
    prepared, _ = evaluation(row | {"tools": None})
    assert prepared.scoring._scored == {}, "rows without tools keep the entry of those that have no such column"


def test_a_conversation_without_room_counts_as_not_answered(tmp_path):
    compared = systems(tmp_path)["sft"]
    warnings = []

    class Echo:
        def generate(self, policy, prompts, sampling):
            return ResponseSet("e", [[Response(ids, [0.0], True, str(len(ids)))] * sampling.n for ids in prompts])

    respondent = Respondent(compared, Echo(), 10, warnings.append)
    many = [turn("user", "x")] * 5
    responses = respondent.answer([[turn("user", "x")], many, [turn("user", "x")] * 2], Sampling(max_tokens=6, n=2))
    assert [[response.text for response in samples] for samples in responses] == [["1", "1"], ["", ""], ["2", "2"]]
    assert responses[1] == [NO_ANSWER, NO_ANSWER]
    assert "sft: 1 conversations" in warnings[0]


def test_later_turns_of_n_conversations_are_answered_once_each(tmp_path):
    compared = systems(tmp_path, best={"of": "sft", "best_of": 4})["best"]

    class Counts:
        def generate(self, policy, prompts, sampling):
            return ResponseSet("e", [[Response([1], [0.0], True, "x")] * sampling.n for _ in prompts])

    respondent = Respondent(compared, Counts(), 100, print)
    talk = [[turn("user", "x")]] * 4
    assert [len(samples) for samples in respondent.answer(talk[:1], Sampling(6))] == [4]
    assert [len(samples) for samples in respondent.answer(talk, Sampling(6), is_continuation=True)] == [1, 1, 1, 1]
