"""Scoring: padding and order change nothing, and the score is the model's own at the last token."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.config.tuning import LoraTuning
from align.models.chat.render import render_conversation
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.models.reward import RewardModel
from align.models.tuning.apply import apply_tuning, load_for_tuning, save_tuned
from tests.support.models.tuning.tuning_cases import push
from tests.support.refusals import Refused

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "A much longer question than that", "Why?")]
ANSWERS = ["Yes", "No, certainly not, by no means whatever", ""]


def test_scores_are_the_models_at_the_last_token(tiny_reward: Path) -> None:
    scorer = RewardModel(tiny_reward, precision="float32", batch_size=2)
    scores = scorer.score(PROMPTS, ANSWERS)
    model = load_reward(tiny_reward)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        ids = render_conversation(scorer.tokenizer, [*prompt, {"role": "assistant", "content": answer}])
        with torch.no_grad():
            assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    one_by_one = [RewardModel(tiny_reward, precision="float32").score([p], [a])[0]
                  for p, a in zip(PROMPTS, ANSWERS, strict=True)]  # fmt: skip
    assert scores == pytest.approx(one_by_one, abs=1e-5)
    assert scorer.score(PROMPTS[::-1], ANSWERS[::-1]) == pytest.approx(scores[::-1], abs=1e-5)


def test_a_model_that_cannot_be_run_ragged_gives_the_same_scores(tiny_reward: Path, monkeypatch) -> None:
    ragged = RewardModel(tiny_reward, precision="float32", batch_size=3)
    monkeypatch.setattr("align.models.reward.try_ragged", lambda model: False)
    padded = RewardModel(tiny_reward, precision="float32", batch_size=3)
    assert ragged._ragged and not padded._ragged
    assert padded.score(PROMPTS, ANSWERS) == pytest.approx(ragged.score(PROMPTS, ANSWERS), abs=1e-5)


def test_what_conversations_begin_with_is_read_once(tiny_reward: Path) -> None:
    beginning, ends = list(range(20, 40)), [[5, 6], [7], [5, 6], [8, 9, 10, 11]]
    rows = [[*beginning, *end] for end in ends]
    places = [[21], [3, 20], [21], [19, 23]]
    plain = RewardModel(tiny_reward, precision="float32").score_places(rows, places)
    model = RewardModel(tiny_reward, precision="float32", share_beginnings=True)
    read = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    scores = model.score_places(rows, places)
    hook.remove()
    assert read == [20 + 2 + 1 + 4]  # the third row is the first
    for got, want in zip(scores, plain, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    assert scores[0] == scores[2]


def test_whatever_conversations_begin_with_is_read_once(tiny_reward: Path) -> None:
    system, question = list(range(20, 40)), [50, 51, 52, 53]
    rows = [[*system, *question, 5, 6], [*system, 7], [*system, *question, 8], [*system, *question, 5, 6], [9]]
    places = [[21, 24, 25], [3, 20], [24], [21, 24, 25], [0]]
    plain = RewardModel(tiny_reward, precision="float32").score_places(rows, places)
    for pass_tokens, tokens in ((2048, 20 + 4 + 2 + 1 + 1 + 1), (26, (1 + 26) + 25 + 21)):
        model = RewardModel(tiny_reward, precision="float32", pass_tokens=pass_tokens)
        read, progress = [], []
        model.on_progress = lambda done, total, progress=progress: progress.append((done, total))
        model.model.base_model.register_forward_pre_hook(
            lambda _, __, inputs, read=read: read.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        scores = model.score_places(rows, places)
        assert sum(read) == tokens
        assert progress[-1] == (4, 4)  # the fourth row is the first
        for got, want in zip(scores, plain, strict=True):
            assert got == pytest.approx(want, abs=1e-5)
        assert scores[0] == scores[3]


def test_a_padded_model_takes_rows_for_tokens(tiny_reward: Path, monkeypatch) -> None:
    expected = RewardModel(tiny_reward, precision="float32").score(PROMPTS, ANSWERS)
    monkeypatch.setattr("align.models.reward.try_ragged", lambda model: False)
    padded = RewardModel(tiny_reward, precision="float32", batch_size=2, pass_tokens=2048)
    read = []
    padded.model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(len(inputs["input_ids"])), with_kwargs=True
    )
    assert padded.score(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert read == [2, 1]


def test_a_prepared_model_scores_as_autocast_does(tiny_reward: Path) -> None:
    before = RewardModel(tiny_reward, precision="bfloat16").score(PROMPTS, ANSWERS)
    scorer = RewardModel(tiny_reward, precision="bfloat16", pass_tokens=2048)
    scorer.prepare_for_inference()
    assert {p.dtype for p in scorer.model.model.layers.parameters() if p.dim() == 2} == {torch.bfloat16}
    assert scorer.score(PROMPTS, ANSWERS) == pytest.approx(before, abs=0.02)
    exact = RewardModel(tiny_reward, precision="float32", pass_tokens=2048)
    unprepared = exact.score(PROMPTS, ANSWERS)
    exact.prepare_for_inference()
    assert exact.score(PROMPTS, ANSWERS) == unprepared


def test_rounded_weights_score_as_autocast_does(tiny_reward: Path) -> None:
    scorer = RewardModel(tiny_reward, precision="bfloat16")
    before = scorer.score(PROMPTS, ANSWERS)
    scorer.round_weights()
    assert {p.dtype for p in scorer.model.model.layers.parameters() if p.dim() == 2} == {torch.bfloat16}
    assert scorer.model.score.weight.dtype == torch.float32
    assert scorer.score(PROMPTS, ANSWERS) == pytest.approx(before, abs=0.02)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps of a process are Linux's")
def test_rounded_weights_leave_nothing_of_the_file_in_memory(tiny_reward: Path, tmp_path: Path) -> None:
    model_copy = shutil.copytree(tiny_reward, tmp_path / "own")  # which no other test has loaded
    maps, file = Path("/proc/self/maps"), str((model_copy / "model.safetensors").resolve())
    scorer = RewardModel(model_copy, precision="bfloat16")
    assert file in maps.read_text()
    scorer.round_weights()
    assert file not in maps.read_text()


@pytest.mark.parametrize("is_narrow", [False, True])
def test_rounded_load_equals_rounding(is_narrow: bool, tiny_reward: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_reward, tmp_path / "own")
    tensors = load_file(folder / "model.safetensors")
    if is_narrow:  # as a stage saves it: only the head is in float32
        tensors = {n: t if n == "score.weight" else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scorer = RewardModel(folder, precision="bfloat16")
    scorer.round_weights()
    rounded = RewardModel(folder, precision="bfloat16", rounded=True)
    assert rounded.score(PROMPTS, ANSWERS) == scorer.score(PROMPTS, ANSWERS)
    expected = dict(scorer.model.named_parameters())
    for name, parameter in rounded.model.named_parameters():
        assert parameter.dtype == expected[name].dtype and torch.equal(parameter, expected[name]), name
    assert rounded.model.score.weight.dtype == torch.float32
    exact = RewardModel(folder, precision="float32", rounded=True)
    assert {p.dtype for p in exact.model.parameters()} == {torch.float32}


def test_equal_tensors_are_shared_with_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    tuning = LoraTuning(rank=4, last_layers=1)
    trained = apply_tuning(load_for_tuning(tiny_model, tuning, "bfloat16", reward=True), tuning, 7)
    push(trained)
    save_tuned(trained, load_tokenizer(tiny_model), tmp_path / "model")
    scorer = RewardModel(tmp_path / "model", precision="bfloat16", rounded=True)
    before = scorer.score(PROMPTS, ANSWERS)
    policy = apply_tuning(load_for_tuning(tiny_model, LoraTuning(rank=4), "bfloat16"), LoraTuning(rank=4), 8)
    scorer.share_tensors(policy)
    assert scorer.score(PROMPTS, ANSWERS) == before
    shared = {parameter.data_ptr() for parameter in policy.parameters()}
    own = {name for name, p in scorer.model.named_parameters() if p.data_ptr() not in shared}
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in own} == {*matrices, "score"}
    assert all("layers.1." in name or name == "score.weight" for name in own)
    # A policy that is trained changes its tensors, so none is shared.
    scorer = RewardModel(tmp_path / "model", precision="float32")
    policy = load_policy(tiny_model)
    scorer.share_tensors(policy)
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in scorer.model.parameters()}


def test_unfinished_answers_are_read_without_the_end(tiny_reward: Path) -> None:
    scorer = RewardModel(tiny_reward, precision="float32")
    full, cut = scorer.score(PROMPTS[:1] * 2, ["Yes", "Yes"], [True, False])
    assert full != pytest.approx(cut, abs=1e-4)
    assert scorer.score(PROMPTS[:1], ["Yes"]) == pytest.approx([full], abs=1e-5)


def test_policy_is_no_reward_model(refused: Refused, tiny_model: Path) -> None:
    refused(RewardModel, tiny_model)
