"""The reference's log-probabilities: right whatever the batches, found again under another beta, never another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from align.models.loading import load_policy, load_tokenizer
from align.store.fingerprint import canonical
from align.training import reference
from align.training.fused_head import use_blockwise_head
from align.training.reference import Answer, ReferenceCache, Sums, answer_sums
from align.training.rows import encode_pairs
from tests.support.training.harness import rows

IDENTITY = {"weights": "w", "precision": "float32", "loaded": "float32", "device": "cpu"}


def answers(model: Path) -> list[Answer]:
    values = []
    for row in encode_pairs(load_tokenizer(model), rows(6), 128).rows:
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        values += [Answer(row["prompt_ids"], row[side], shared) for side in ("chosen_ids", "rejected_ids")]
    return values


def test_sums_are_those_of_each_answer_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_blockwise_head()
    model, inputs = load_policy(tiny_model), answers(tiny_model)
    actual = answer_sums(model, inputs, 0, bfloat16=False)
    monkeypatch.setattr(reference, "SCORING_TOKENS", 1)  # one answer at a time: no padding
    alone = answer_sums(model, inputs, 0, bfloat16=False)
    plain = load_policy(tiny_model)
    for index, answer in enumerate(inputs):
        ids = torch.tensor([[*answer.prompt, *answer.ids]])
        with torch.no_grad():
            every = plain(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(answer.ids) :, 0]
        assert actual.total[index] == pytest.approx(float(every.sum()), abs=1e-3)
        assert actual.tail[index] == pytest.approx(float(every[answer.shared :].sum()), abs=1e-3)
        assert alone.total[index] == pytest.approx(actual.total[index], abs=1e-3)
    assert any(actual.tail) and not all(actual.tail)  # one side of a pair is longer, the other is not
    assert actual.weighted(None) == actual.total
    assert actual.weighted(0.25)[1] == pytest.approx(actual.total[1] - 0.75 * actual.tail[1])
    # The head that scores labeled positions only is gone again.
    assert "forward" not in model.__dict__


def test_tokens_that_a_tool_wrote_are_not_summed(tiny_model: Path) -> None:
    use_blockwise_head()
    answer = answers(tiny_model)[0]
    mask = [1, 0, *[1] * (len(answer.ids) - 2)]
    masked = Answer(answer.prompt, answer.ids, 1, mask)
    sums = answer_sums(load_policy(tiny_model), [masked], 0, bfloat16=False)
    ids = torch.tensor([[*answer.prompt, *answer.ids]])
    with torch.no_grad():
        logits = load_policy(tiny_model)(ids).logits
    every = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(answer.ids) :, 0]
    assert sums.total[0] == pytest.approx(float((every * torch.tensor(mask)).sum()), abs=1e-3)
    # After the first token that the assistant wrote.
    assert sums.tail[0] == pytest.approx(float(every[2:].sum()), abs=1e-3)


def test_the_key_of_answers_without_gaps_is_as_it_was(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, None, IDENTITY)
    plain = Answer([1, 2], [3, 4], 1)
    line = hashlib.sha256((canonical({**IDENTITY, "version": reference.VERSION}) + "[1, 2][3, 4]1\n").encode())
    assert cache.key([plain]) == line.hexdigest()
    assert cache.key([plain]) != cache.key([Answer([1, 2], [3, 4], 1, [1, 0])])


def computed(sums: Sums, calls: list[int]) -> object:
    def compute(inputs: object) -> Sums:
        calls.append(1)
        return sums

    return compute


def test_another_run_finds_them_and_other_rows_or_weights_do_not(tmp_path: Path) -> None:
    inputs = [Answer([1, 2], [3, 4], 1), Answer([1, 2], [5], 1)]
    calls: list[int] = []
    compute = computed(Sums([-1.5, -2.5], [-0.5, 0.0]), calls)
    first = ReferenceCache(tmp_path / "a", tmp_path / "shared", IDENTITY)
    assert first.sums("train", inputs, compute).total == [-1.5, -2.5]  # type: ignore[arg-type]
    assert (first.computed, first.hits) == (2, 0)
    other_cache = ReferenceCache(tmp_path / "b", tmp_path / "shared", IDENTITY)
    assert other_cache.sums("train", inputs, compute) == Sums([-1.5, -2.5], [-0.5, 0.0])  # type: ignore[arg-type]
    assert (other_cache.computed, other_cache.hits, len(calls)) == (0, 2, 1)
    for change in ("weights", "precision", "loaded", "device"):
        cache = ReferenceCache(tmp_path / f"c{change}", tmp_path / "shared", IDENTITY | {change: "other"})
        cache.sums("train", inputs, compute)  # type: ignore[arg-type]
        assert cache.computed == 2, change
    for number, changed in enumerate((
        [Answer([1, 2], [3, 4], 1), Answer([1, 2], [6], 1)],
        [Answer([1], [2, 3, 4], 1), Answer([1, 2], [5], 1)],
        [Answer([1, 2], [3, 4], 2), Answer([1, 2], [5], 1)],
        inputs[::-1],
    )):  # fmt: skip
        cache = ReferenceCache(tmp_path / f"d{number}", tmp_path / "shared", IDENTITY)
        cache.sums("train", changed, compute)  # type: ignore[arg-type]
        assert cache.computed == 2, changed


def test_resumed_stage_replaces_a_damaged_file(tmp_path: Path) -> None:
    inputs = [Answer([1, 2], [3, 4])]
    calls: list[int] = []
    compute = computed(Sums([-1.5], [0.0]), calls)
    ReferenceCache(tmp_path / "own", None, IDENTITY).sums("train", inputs, compute)  # type: ignore[arg-type]
    again = ReferenceCache(tmp_path / "own", tmp_path / "shared", IDENTITY)
    again.sums("train", inputs, compute)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert again.files[0].is_file()  # and the shared folder gets what was found
    file = tmp_path / "own" / "reference_train.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    again.files[0].write_bytes(b"no tensors")
    ReferenceCache(tmp_path / "own", tmp_path / "shared", IDENTITY).sums("train", inputs, compute)  # type: ignore[arg-type]
    assert len(calls) == 2
    ReferenceCache(tmp_path / "own", None, IDENTITY).sums("train", inputs, compute)  # type: ignore[arg-type]
    assert len(calls) == 2


def test_resumed_stage_ignores_its_file_of_other_weights(tmp_path: Path) -> None:
    """Two makings of a checkpoint may have one key, so a killed stage may go on beside other weights."""
    inputs = [Answer([1, 2], [3, 4])]
    warnings: list[str] = []
    ReferenceCache(tmp_path, None, IDENTITY).sums("train", inputs, computed(Sums([-1.5], [0.0]), []))  # type: ignore[arg-type]
    cache = ReferenceCache(tmp_path, None, IDENTITY | {"weights": "v"}, warnings.append)
    assert cache.sums("train", inputs, computed(Sums([-9.0], [0.0]), [])).total == [-9.0]  # type: ignore[arg-type]
    assert len(warnings) == 1 and "another key" in warnings[0]


def test_a_changed_number_is_computed_again_in_both_places(tmp_path: Path) -> None:
    inputs = [Answer([1, 2], [3, 4])]
    separate, shared = tmp_path / "own", tmp_path / "shared"
    compute = computed(Sums([-1.5], [-0.5]), [])
    ReferenceCache(separate, shared, IDENTITY).sums("train", inputs, compute)  # type: ignore[arg-type]
    files = [*separate.iterdir(), *shared.iterdir()]
    for file in files:
        with safe_open(file, "pt") as tensors:
            header = tensors.metadata()
        save_file({"total": torch.tensor([-6.78]), "tail": torch.tensor([-0.5])}, file, header)
    warnings: list[str] = []
    again = ReferenceCache(separate, shared, IDENTITY, warnings.append)
    assert again.sums("train", inputs, compute).total == [-1.5]  # type: ignore[arg-type]
    assert (again.computed, len(warnings)) == (1, len(files)) and len(files) == 2
    assert ReferenceCache(separate, None, IDENTITY, pytest.fail).sums("train", inputs, compute).total == [-1.5]  # type: ignore[arg-type]
