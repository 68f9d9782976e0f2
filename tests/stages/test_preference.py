"""What the preference stages have in common, end to end on a tiny model: they learn, and resume exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer.dpo_trainer import DataCollatorForPreference

from align.data.rows import write_rows
from align.models.built_in import make_tiny
from align.models.fast.real_tokens import computes_real_tokens
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.stages.preference import Reference, prepare_policy
from align.store.artifacts import Artifact, Kind
from align.training.reference import Answer, answer_sums
from align.training.rows import encode_pairs
from tests.support.models.tuning.tuning_cases import CASES
from tests.support.refusals import Refused
from tests.support.stages.more_tokens import add_token
from tests.support.stages.stage_contexts import PREFERENCE_KINDS, preference_stage
from tests.support.training.harness import events, losses, rows
from tests.support.training.killed_stage import Killed, dying

LORA = {"method": "lora", "rank": 8}


def gap(folder: Path) -> float:
    """Mean log-probability per token of chosen minus rejected answers that were not trained on, in nats."""
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    total = 0.0
    for row in encode_pairs(tokenizer, rows(12, start=40), 128).rows:
        for side, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                every = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            total += sign * float(every[-len(row[side]) :].mean())
    return total / 12


def killed_and_whole(kind: str, model: Path, root: Path, **fields: Any) -> None:
    """The better answers become likelier; killed after its fifth step, the stage ends with the same weights."""
    run = STAGES[kind].runner()
    uninterrupted = preference_stage(root / "whole", model, kind, save_steps=2, **fields)
    metrics = run(uninterrupted)
    assert gap(uninterrupted.output / "model") > gap(model) + 0.01
    assert metrics["steps"] == 6
    parts = preference_stage(root / "parts", model, kind, save_steps=2, **fields)
    with pytest.raises(Killed):
        run(dying(parts, 5))
    assert run(parts)["resumed_from_step"] == 4
    done = [event["done"] for event in events(parts, "progress") if event["unit"] == "steps"]
    # Each attempt reports where it begins; the second one continues instead of starting over.
    assert done == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert losses(parts) == losses(uninterrupted)
    expected, resumed = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert expected.keys() == resumed.keys()
    assert all(expected[name].equal(resumed[name]) for name in expected)


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_a_killed_stage_learns_what_the_whole_one_does(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    killed_and_whole(kind, tiny_model, tmp_path, **PREFERENCE_KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_adapters_learn_and_resume(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    killed_and_whole(kind, tiny_model, tmp_path, tuning=LORA, learning_rate=1e-2, **PREFERENCE_KINDS[kind])


def each_loss() -> list[Any]:
    needs = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.1}, "alphapo": {"alpha": 0.25}}
    needs |= {"simpo": {"beta": 2.0}}
    cases = []
    for kind in ("dpo", "kto", "cpo"):
        losses_ = get_args(STAGES[kind].config_class().model_fields["loss"].annotation)
        for loss in losses_:
            fields = {"loss": loss, **({"batch_size": 16} if kind == "kto" else {}), **needs.get(loss, {})}
            cases.append(pytest.param(kind, fields, id=f"{kind}-{loss}"))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), each_loss())
def test_every_loss_learns_and_resumes(kind: str, fields: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    killed_and_whole(kind, tiny_model, tmp_path, **fields)


def test_another_run_finds_the_reference_scored(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same policy and rows under another beta: nothing is scored again, and the losses are the same as without."""
    run = STAGES["dpo"].runner()
    record = {"key": "k" * 64, "outputs": {"model/model.safetensors": {"sha256": "0" * 64}}}

    def stage(name: str, cache: Path | None, **fields: Any) -> StageContext:
        plain = preference_stage(tmp_path / name, tiny_model, "dpo", max_steps=1, **fields)
        policy = replace(plain.inputs["policy"], record=record)
        return replace(plain, cache=cache, inputs={**plain.inputs, "policy": policy})

    first = run(stage("a", tmp_path / "cache"))
    assert (first["reference_computed"], first["reference_cached"]) == (72, 0)
    second = stage("b", tmp_path / "cache", beta=0.3, learning_rate=1e-4, ld_alpha=0.5)
    metrics = run(second)
    assert (metrics["reference_computed"], metrics["reference_cached"]) == (0, 72)
    assert not any(event["unit"] == "reference answers" for event in events(second, "progress"))
    alone = stage("c", None, beta=0.3, learning_rate=1e-4, ld_alpha=0.5)
    assert run(alone)["reference_computed"] == 72
    assert losses(second) == losses(alone)
    # The reference's tail counts as the policy's does, so there is no margin before the first step.
    assert losses(second)[1] == pytest.approx(0.693147, abs=1e-4)


def test_padded_rows_have_a_reference_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    keys = set()
    for name, shared in (("line", True), ("padded", False)):
        plain = preference_stage(tmp_path / name, tiny_model, "dpo")
        stage = replace(plain, runtime=plain.runtime.model_copy(update={"shared_prefixes": shared}))
        reference = Reference(stage, prepare_policy(stage, encode_pairs, DataCollatorForPreference))
        keys.add(reference.cache.key([]))
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("options", "in_line"),
    [({}, True), ({"torch_compile_mode": "default"}, False), ({"neftune_noise_alpha": 5.0}, False)],
)
def test_options_that_need_padded_rows_get_them(
    options: dict[str, Any], in_line: bool, tiny_model: Path, tmp_path: Path
) -> None:
    stage = preference_stage(tmp_path, tiny_model, "dpo", trainer=options)
    model = prepare_policy(stage, encode_pairs, DataCollatorForPreference).tuned_model
    assert computes_real_tokens(model) is in_line


def other_model(folder: Path, tiny_model: Path, **changes: Any) -> Artifact:
    """A tiny model of another seed, or with files changed, as a reference."""
    folder.mkdir()
    made_ = make_tiny(folder / "model", seed=5)
    for name, change in changes.items():
        file = made_ / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return Artifact("other", Kind.POLICY, folder, {"key": "other"})


def test_the_reference_may_be_another_stage_s(tiny_model: Path, tmp_path: Path) -> None:
    plain = preference_stage(
        tmp_path / "a", tiny_model, "dpo", max_steps=1, reference="other", beta=0.2, learning_rate=1e-9
    )
    reference = other_model(tmp_path / "r", tiny_model)
    metrics = STAGES["dpo"].runner()(replace(plain, inputs={**plain.inputs, "reference": reference}))
    models, total = (load_policy(tiny_model), load_policy(reference.model)), 0.0
    for row in encode_pairs(load_tokenizer(tiny_model), rows(12, start=24), 128).rows:
        for side, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            for model, times in zip(models, (sign, -sign), strict=True):
                with torch.no_grad():
                    every = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
                total += times * float(every[-len(row[side]) :].sum())
    # It is not the policy, so there is a margin before the first step: beta times the difference of the two models.
    assert metrics["test_margin_before"] == pytest.approx(0.2 * total / 12, rel=1e-3, abs=1e-4)
    assert abs(metrics["test_margin_before"]) > 0.01


STARTS: dict[str, dict[str, Any]] = {
    name: CASES[name] for name in ("lora", "orthogonal", "eva", "pissa", "olora", "dora", "nf4", "loftq", "loftq_dora")
}
STARTS["loftq_last"] = {**CASES["loftq"], "last_layers": 1, "targets": ["q_proj", "down_proj"]}
STARTS["sequential"] = {"method": "adapters", "size": 16, "position": "sequential"}


@pytest.mark.parametrize("tuning", ["pissa", "loftq", "loftq_dora", "loftq_last"])
def test_the_policy_starts_without_a_margin(tuning: str, tiny_model: Path, tmp_path: Path) -> None:
    """DPO's loss of the first step is log 2, even at a large beta."""
    stage = preference_stage(tmp_path, tiny_model, "dpo", max_steps=1, beta=20.0, tuning=STARTS[tuning])
    STAGES["dpo"].runner()(stage)
    assert losses(stage)[1] == pytest.approx(0.693147, abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", STARTS)
def test_the_reference_is_the_policy_before_its_first_step(
    tuning: str, precision: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Wherever adapters start, and in bfloat16 too, where weights without them round otherwise."""
    stage = preference_stage(tmp_path, tiny_model, "dpo", tuning=STARTS[tuning], precision=precision)
    prepared = prepare_policy(stage, encode_pairs, DataCollatorForPreference)
    answers = [Answer(row["prompt_ids"], row["chosen_ids"]) for row in prepared.train.rows]
    logps = Reference(stage, prepared).sums("train", answers).total
    pad, low = prepared.tokenizer.pad_token_id, precision == "bfloat16"
    policy = answer_sums(prepared.tuned_model, answers, pad, low).total
    # Orthogonal factors have a product of 0 in exact arithmetic, and bfloat16 rounds it.
    rounded = tuning == "orthogonal" and low
    assert logps == pytest.approx(policy, abs=0.2 if rounded else 1e-4)


def test_kto_s_reference_has_loftq_s_correction(tiny_model: Path, tmp_path: Path) -> None:
    stage = preference_stage(tmp_path, tiny_model, "kto", max_steps=1, beta=20.0, batch_size=16, tuning=STARTS["loftq"])
    STAGES["kto"].runner()(stage)
    assert losses(stage)[1] == pytest.approx(0.5, abs=1e-3)


def test_a_named_reference_is_completed_as_the_policy_is(tiny_model: Path, tmp_path: Path) -> None:
    """The policy's own checkpoint, named, gives the numbers that it gives unnamed."""
    fields = {"max_steps": 1, "beta": 20.0, "tuning": STARTS["loftq"], "reference": "other"}
    stage = preference_stage(tmp_path / "a", tiny_model, "dpo", **fields)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "model").symlink_to(tiny_model)
    reference = Artifact("other", Kind.POLICY, tmp_path / "r", {"key": "r" * 64})
    metrics = STAGES["dpo"].runner()(replace(stage, inputs={**stage.inputs, "reference": reference}))
    assert metrics["test_margin_before"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("lora", "dora", True),  # the loaded weights, whatever the adapters
        ("nf4", "qdora", True),
        ("nf4", "loftq", False),
        ("loftq", "loftq_last", False),
        ("pissa", "lora", False),
        ("pissa", "olora", False),
    ],
)
def test_reference_scores_are_shared_where_the_start_is_the_same(
    first: str, second: str, shared: bool, tiny_model: Path, tmp_path: Path
) -> None:
    record = {"key": "k" * 64, "outputs": {"model/model.safetensors": {"sha256": "0" * 64}}}
    metrics = []
    for name in (first, second):
        plain = preference_stage(tmp_path / name, tiny_model, "dpo", max_steps=1, tuning=(CASES | STARTS)[name])
        policy = replace(plain.inputs["policy"], record=record)
        stage = replace(plain, cache=tmp_path / "cache", inputs={**plain.inputs, "policy": policy})
        metrics.append(STAGES["dpo"].runner()(stage))
    assert metrics[1]["reference_cached"] == (72 if shared else 0)


def test_a_reference_of_another_vocabulary_is_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    plain = preference_stage(tmp_path / "a", tiny_model, "kto", reference="other")
    reference = other_model(tmp_path / "r", tiny_model)
    add_token(reference.model, "<extra>")
    refused(lambda: STAGES["kto"].runner()(replace(plain, inputs={**plain.inputs, "reference": reference})))


def test_without_reference_the_log_probabilities_are_compared(tiny_model: Path, tmp_path: Path) -> None:
    fields = {"reference_free": True, "loss": "sigmoid_norm", "beta": 2.0, "max_steps": 1, "learning_rate": 1e-9}
    metrics = STAGES["dpo"].runner()(preference_stage(tmp_path, tiny_model, "dpo", **fields))
    assert "reference_computed" not in metrics
    simpo = {"beta": 2.0, "simpo_gamma": 0.0, "max_steps": 1, "learning_rate": 1e-9}
    same = STAGES["simpo"].runner()(preference_stage(tmp_path / "simpo", tiny_model, "simpo", **simpo))
    assert metrics["test_loss_before"] == pytest.approx(same["test_loss_before"], rel=1e-3)


def test_kto_says_which_weights_suit_the_labels(tiny_model: Path, tmp_path: Path) -> None:
    plain = preference_stage(tmp_path, tiny_model, "kto", max_steps=1, desirable_weight=3.0)
    STAGES["kto"].runner()(plain)
    (warning,) = [e["message"] for e in events(plain, "warning") if "eq. 8" in e["message"]]
    assert "24 answers are desirable and 24 not" in warning and "count 3.00 times" in warning
    assert warning.endswith("Set desirable_weight to 1.")
    # The lint looked at answers, not at pairs.
    looked_at = json.loads((plain.output / "findings.json").read_text())["looked_at"]
    assert looked_at == {"train": {"rows": 48, "of": 48}, "test": {"rows": 24, "of": 24}}


def test_kto_takes_answers_that_were_cut_off(tiny_model: Path, tmp_path: Path) -> None:
    """Such an answer has no end of turn, which is no fault of the tokenizer's."""
    plain = preference_stage(tmp_path, tiny_model, "kto", max_steps=1)
    write_rows(plain.inputs["data"].split("train"), [{**row, "rejected_finished": False} for row in rows(24)])
    assert STAGES["kto"].runner()(plain)["answers"] == 48


GIVEN = {"policy": "p", "data": "d", "learning_rate": 1e-5}


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_a_config_survives_its_own_dump(kind: str) -> None:
    """A stage's process gets every field, those left at their defaults too."""
    config = STAGES[kind].config_class()
    for fields in ({}, PREFERENCE_KINDS[kind]):
        settings = config(**GIVEN, **fields)
        assert config.model_validate(json.loads(settings.model_dump_json())) == settings


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("dpo", {"loss": "sigmod"}),
        ("dpo", {"losses": {"sigmod": 1.0}}),
        ("dpo", {"loss": "ipo", "losses": {"sigmoid": 1.0}}),
        ("dpo", {"losses": {"sigmoid": 0.0}}),
        ("dpo", {"losses": {"sigmoid": 1.0, "sft": 0.1}, "sft_weight": 0.1}),
        ("dpo", {"label_smoothing": 0.1}),
        ("dpo", {"discopop_tau": 0.1}),
        ("dpo", {"loss": "exo_pair"}),
        ("dpo", {"loss": "aot", "micro_batch_size": 1}),
        ("dpo", {"loss": "aot", "use_weighting": True}),
        ("dpo", {"loss": "apo_zero", "f_divergence_type": "js_divergence"}),
        ("dpo", {"f_alpha_divergence_coef": 0.3}),
        ("dpo", {"reference_free": True, "reference": "sft"}),
        ("dpo", {"reference_free": True, "loss": "bco_pair"}),
        ("dpo", {"beta_schedule": "linear"}),
        ("kto", {"final_beta": 0.1}),
        ("dpo", {"trainer": {"loss_type": ["ipo"]}}),
        ("dpo", {"trainer": {"ld_alpha": 0.5}}),
        ("kto", {"trainer": {"precompute_ref_log_probs": False}}),
        ("kto", {"micro_batch_size": 1}),
        ("kto", {"loss": "bco"}),
        ("cpo", {"loss": "hinge", "label_smoothing": 0.1}),
        ("cpo", {"simpo_gamma": 1.0}),
        ("cpo", {"alpha": 0.25}),
        ("cpo", {"loss": "alphapo", "cpo_alpha": 0.5}),
        ("simpo", {"loss": "sigmoid"}),
        ("cpo", {"trainer": {"generate_during_eval": True}}),
        ("orpo", {"trainer": {"padding_value": 3}}),
    ],
)
def test_settings_that_do_not_fit_together(refused: Refused, kind: str, fields: dict[str, Any]) -> None:
    refused(lambda: STAGES[kind].config_class()(**GIVEN, **fields))


@pytest.mark.parametrize("kind", ["cpo", "simpo", "orpo"])
def test_missing_experimental_trainer_is_refused_before_the_run(
    refused: Refused, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "orpo" if kind == "orpo" else "cpo"
    config = STAGES[kind].config_class()
    monkeypatch.setattr(config, "trainer_class", f"trl.experimental.{name}.moved:{name.upper()}Config")
    refused(config, **GIVEN)
