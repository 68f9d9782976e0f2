"""The model card: metadata that the Hub's own library reads, numbers with intervals, other people's text as text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from align.data.card import plain, write_card
from align.export.export import Agreement, Written
from align.export.model_card import write_model_card
from align.export.model_card_facts import Facts, base_model, license_of, weight_history
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.data.sample_build import HOSTILE, row, write_build
from tests.support.refusals import Refused
from tests.support.report.example_card import full_card, small_card

POLICY = Written(False, "bfloat16", 134_515_008, "LlamaForCausalLM", {"model.safetensors": 10})
REWARD = Written(True, "float32", 1000, "LlamaForSequenceClassification", {})
CHECKED = Agreement("tokens", 8, 371, ["transformers 5.17.0", "vllm 0.31.0"], 2e-6, ties=1, rounding=2)
KEYS = {"model": "0" * 64, "sft": "2" * 64, "ppo": "3" * 64}


def artifact(folder: Path, stage: str, kind: Kind, key: str, **record: Any) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    usual = {
        "key": key, "kind": stage, "stage": stage, "pipeline": "quick", "config": {}, "seed": 17, "metrics": {},
        "tokens": 38_200, "seconds": 200.0, "peak_memory_bytes": 2**31, "created": "2026-02-03T04:05:06+00:00",
        "align": "0.1.0", "git": "c" * 40, "packages": {"torch": "2.13.0"}, "platform": "linux x86_64, 2 cores",
        "command": "align run quick.yaml",
    }  # fmt: skip
    return Artifact(stage, kind, folder, usual | record)


def lineage(root: Path, source: str = "org/base", licenses: dict[str, str | None] | None = None) -> list[Artifact]:
    """Base, data, SFT and PPO; the base's license is MIT by the card in its folder."""
    model = artifact(
        root / "model", "model", Kind.MODEL, KEYS["model"], config={"source": source, "revision": "b" * 40}
    )
    (model.path / "model").mkdir(exist_ok=True)
    (model.path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    rows = write_build(
        root / "data", [row("a", "b"), row("c", "d", "second")], [row("e", "f")],
        [(row("a!", "b"), "duplicate", {})], licenses or {"first": "Apache-2.0", "second": "Apache-2.0"},
    )  # fmt: skip
    recipe = {"kind": "instructions", "sources": [{"type": "hub", "dataset": "org/set"}, {"type": "files"}]}
    write_card(rows, recipe, json.loads((rows / "ledger.json").read_text()), "set")
    data = artifact(rows, "data", Kind.INSTRUCTIONS, "1" * 64)
    sft = artifact(
        root / "sft", "sft", Kind.POLICY, KEYS["sft"], metrics={"steps": 25}, inputs={"model": KEYS["model"]}
    )
    ppo = artifact(
        root / "ppo", "ppo", Kind.POLICY, KEYS["ppo"], metrics={"updates": 16}, inputs={"policy": KEYS["sft"]}
    )
    return [model, data, sft, ppo]


def scored(root: Path, card: dict[str, Any]) -> dict[str, Any]:
    return {
        "scorecard": card | {"settings": card["settings"] | {"checkpoints": KEYS}},
        "scored_by": artifact(root / "evaluate", "evaluate", Kind.SCORECARD, "4" * 64),
    }


def written(folder: Path, facts: Facts) -> tuple[dict[str, Any], str]:
    """Metadata and text, as the Hub's library reads them."""
    folder.mkdir(exist_ok=True)
    card = ModelCard.load(write_model_card(folder, facts))
    return card.data.to_dict(), card.text


def test_the_metadata_is_the_hubs(tmp_path: Path) -> None:
    facts = Facts("me-ppo", POLICY, CHECKED, lineage(tmp_path), **scored(tmp_path, full_card()))
    data, _ = written(tmp_path / "out", facts)
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert data["datasets"] == ["org/set"]
    assert data["license"] == ["apache-2.0", "mit"], "both ask for credit alone"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["align", "sft", "ppo"]


def trained_on(root: Path, base: Artifact, kind: str, key: str, **record: Any) -> Artifact:
    """A checkpoint that a stage of ``kind`` made from ``base``."""
    makes = STAGES[kind].makes if kind in STAGES else Kind.POLICY
    inputs = {"inputs": {"model": base.record["key"]}} | record
    return artifact(root / f"{kind}-{key[0]}", kind, makes or Kind.POLICY, key, **inputs)


TRAINING_KINDS = [kind for kind, stage in STAGES.items() if stage.distributed]


def test_only_training_kinds_model_and_merge_have_verbs() -> None:
    assert {"pretrain", "sft", "reward", "ppo"} < set(TRAINING_KINDS)
    assert {kind for kind, stage in STAGES.items() if stage.card_verb} == {*TRAINING_KINDS, "model", "merge"}


@pytest.mark.parametrize("kind", [kind for kind in (*TRAINING_KINDS, "merge") if kind != "reward"])
def test_a_kind_that_trains_is_a_tag_and_its_verb_is_on_the_card(kind: str, tmp_path: Path) -> None:
    model = lineage(tmp_path)[0]
    facts = Facts("x", POLICY, None, [model, trained_on(tmp_path, model, kind, "5" * 64)])
    data, text = written(tmp_path / "out", facts)
    assert data["tags"] == ["align", kind] and data["base_model_relation"] == "finetune"
    assert f"Its weights: model (imported) → {plain(kind)} ({STAGES[kind].card_verb})." in text


def test_a_stage_of_the_users_own_is_on_the_card_by_its_record(tmp_path: Path) -> None:
    model = lineage(tmp_path)[0]
    mine = trained_on(tmp_path, model, "rewrite", "5" * 64, card_verb="trained to rewrite")
    data, text = written(tmp_path / "out", Facts("x", POLICY, None, [model, mine]))
    assert data["tags"] == ["align", "rewrite"]
    assert "Its weights: model (imported) → rewrite (trained to rewrite)." in text


def test_reward_models_and_teachers_are_not_in_weight_history(tmp_path: Path) -> None:
    model, _, sft, ppo = lineage(tmp_path)
    teacher = trained_on(tmp_path, model, "dpo", "5" * 64)
    distilled = trained_on(tmp_path, sft, "distill", "6" * 64)
    distilled.record["inputs"] |= {"teacher": teacher.record["key"]}
    reward = trained_on(tmp_path, sft, "reward", "7" * 64)
    ppo.record["inputs"] = {"policy": distilled.record["key"], "reward": reward.record["key"]}
    history = weight_history([model, sft, teacher, distilled, reward, ppo])
    assert [entry.stage for entry in history] == ["model", "sft", "distill", "ppo"]


def test_the_history_goes_through_merges_and_imports(tmp_path: Path) -> None:
    model, _, sft, ppo = lineage(tmp_path)
    merged = trained_on(tmp_path, model, "merge", "5" * 64)
    merged.record["inputs"] = {"policies": [sft.record["key"], ppo.record["key"]], "base": None}
    assert weight_history([model, sft, ppo, merged]) == [model, sft, ppo, merged]
    # What reads an import names the import's key; the lineage has the original, with the same weights.
    tuned = trained_on(tmp_path, sft, "dpo", "6" * 64, inputs={"policy": "9" * 64})
    tuned.record["input_stages"] = [{"stage": "taken", "kind": "artifact", "key": "9" * 64, "weights": sft.weights}]
    assert weight_history([model, sft, tuned]) == [model, sft, tuned]


def test_metadata_results_equal_scorecard_with_n_and_interval(tmp_path: Path) -> None:
    card = full_card()
    card["tasks"]["ifeval"]["settings"] |= {"dataset": "google/IFEval", "revision": "d" * 40}
    facts = Facts("me-ppo", POLICY, CHECKED, lineage(tmp_path), **scored(tmp_path, card))
    write_model_card(tmp_path, facts)
    results = {
        eval_result.metric_name.split(" (n ")[0]: eval_result
        for eval_result in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    assert len(results) == len(card["estimates"]["ppo"])
    actual, estimate = results["Prompt, strict"], card["estimates"]["ppo"]["ifeval.prompt_strict"]
    assert actual.metric_value == pytest.approx(estimate["value"], rel=1e-5)
    assert actual.metric_name == (
        f"Prompt, strict (n 40, 95 % interval {estimate['low']:.3f} to {estimate['high']:.3f})"
    )
    assert actual.metric_args["n"] == 40 and actual.metric_args["low"] == pytest.approx(estimate["low"], rel=1e-5)
    assert (actual.dataset_type, actual.dataset_revision, actual.dataset_name) == ("google/IFEval", "d" * 40, "IFEval")
    assert results["gold"].dataset_type == "prompts" and results["Judge's score"].dataset_type == "mt"


def test_the_table_has_every_metric_beside_its_rivals(tmp_path: Path) -> None:
    card = full_card()
    _, text = written(tmp_path, Facts("x", POLICY, CHECKED, lineage(tmp_path), **scored(tmp_path, card)))
    (head,) = [line for line in text.splitlines() if line.startswith("| task | metric")]
    assert head.endswith("| **ppo** | sft | model | prompted | best8 | change from sft |")
    (line,) = [line for line in text.splitlines() if "| Prompt, strict |" in line]
    difference = next(
        entry for entry in card["differences"]
        if (entry["policy"], entry["against"], entry["metric"]) == ("ppo", "sft", "ifeval.prompt_strict")
    )  # fmt: skip
    for name in ("ppo", "sft", "model", "prompted", "best8"):
        estimate = card["estimates"][name]["ifeval.prompt_strict"]
        assert f"{estimate['value']:.3f} \\({estimate['low']:.3f} to {estimate['high']:.3f}\\)" in line
    assert f"{difference['value']:+.3f}".replace("-", "−") in line and ", p " in line
    assert "prompted is model as it is, prompted with 3 examples and a system message." in text
    assert "best8 is sft, the best of 8 answers by the reward model." in text
    assert "Measured by the evaluation evaluate (key `444444444444`, 2026-02-03)" in text


def test_limitations_are_what_was_measured(tmp_path: Path) -> None:
    card = full_card()
    card["flags"] = [
        {"policy": "ppo", "kind": "length", "text": "ppo answers with 90 tokens"},
        {"policy": "sft", "kind": "length", "text": "another's flag"},
    ]
    ancestors = lineage(tmp_path)
    ancestors[-1].path.joinpath("events.jsonl").write_text(
        json.dumps({"event": "warning", "message": "update 7: entropy fell"}) + "\n"
    )
    _, text = written(tmp_path, Facts("x", POLICY, CHECKED, ancestors, **scored(tmp_path, card)))
    limits = text.split("## Limitations")[1].split("## Training")[0]
    failed = [gate for gate in card["gates"] if gate["system"] == "ppo" and gate["passed"] is False]
    passed = [gate for gate in card["gates"] if gate["system"] == "ppo" and gate["passed"]]
    assert failed and passed
    assert limits.count("- Gate not passed") == len(failed)
    assert "- length: ppo answers with 90 tokens." in limits and "another's" not in limits
    assert "- Warning in training, ppo: update 7: entropy fell" in limits
    assert "Safety was not measured" not in limits, "a task of refusals is there"
    del card["tasks"]["refusals"]
    _, text = written(tmp_path, Facts("x", POLICY, CHECKED, ancestors, **scored(tmp_path, card)))
    assert "Safety was not measured" in text


def test_a_gate_that_nobody_could_decide_is_a_limitation(tmp_path: Path) -> None:
    card = full_card() | {"flags": []}
    gate = {"system": "ppo", "level": "error", "passed": None, "text": "kl of ppo cannot be compared with <= 5"}
    card["gates"] = [gate, gate | {"passed": True, "text": "a passed one"}]
    _, text = written(tmp_path, Facts("x", POLICY, CHECKED, lineage(tmp_path), **scored(tmp_path, card)))
    assert "- Gate could not be decided (error): kl of ppo cannot be compared with" in text
    assert "no gate failed" not in text and "a passed one" not in text


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    data, text = written(tmp_path, Facts("x", POLICY, None, lineage(tmp_path)))
    assert "model-index" not in data
    assert "No evaluation of this checkpoint is recorded." in text
    assert "Nothing was measured of this checkpoint, its safety least of all." in text
    assert "Not checked when it was written" in text
    facts = scored(tmp_path, small_card())
    facts["scorecard"]["settings"]["checkpoints"] = {"ppo": "9" * 64}
    data, text = written(tmp_path, Facts("x", POLICY, None, lineage(tmp_path), **facts))
    assert "model-index" not in data and "No evaluation of this checkpoint" in text, "the key decides, not the name"


def test_what_was_checked_is_said(tmp_path: Path) -> None:
    _, text = written(tmp_path, Facts("x", POLICY, CHECKED, lineage(tmp_path)))
    assert (
        "371 greedy tokens of 8 prompts are the checkpoint's, in float32, in transformers 5.17.0 and vllm 0.31.0"
        in text
    )
    assert "1 answers diverge at two tokens of equal probability" in text
    assert "bfloat16, changes 2 of those answers by rounding alone" in text
    unchecked = replace(CHECKED, unchecked="vLLM is not installed")
    _, text = written(tmp_path, Facts("x", POLICY, unchecked, lineage(tmp_path)))
    assert "Not checked in vLLM: vLLM is not installed." in text
    scores = Agreement("scores", 8, 8, ["transformers 5.17.0"])
    _, text = written(tmp_path, Facts("x", REWARD, scores, lineage(tmp_path)))
    assert "8 scores of 8 prompts are the checkpoint's, in float32, in transformers 5.17.0." in text
    _, text = written(tmp_path, Facts("x", REWARD, None, lineage(tmp_path)))
    assert "Not checked when it was written" in text


def test_training_data_recipe_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    ancestors = lineage(tmp_path)
    ancestors[-1].record["command"] = "align run /home/somebody/quick.yaml"
    pipeline = {"name": "quick", "runtime": {"threads": 2}, "stages": {"data": {"recipe": "/home/somebody/r.yaml"}}}
    _, text = written(tmp_path, Facts("x", POLICY, CHECKED, ancestors, pipeline))
    assert "| ppo | ppo | PolicyCheckpoint | 16 | 38,200 | 3 min 20 s | 2.0 GiB | 17 | `333333333333` |" in text
    assert "It is the result of stage ppo of the pipeline quick, key `333333333333`." in text
    history = "model (imported) → sft (fine-tuned on responses) → ppo (trained with PPO and a critic)"
    assert f"Its weights: {history}." in text
    assert "InstructionData: 2 train, 1 test." in text and "1 rows were dropped: 1 duplicate." in text
    assert "recipe: ~/r.yaml" in text and "threads" not in text and "somebody" not in text
    assert "align run ~/quick.yaml" in text and "commit " + "c" * 40 in text and "torch 2.13.0" in text
    _, text = written(tmp_path, Facts("x", POLICY, CHECKED, ancestors))
    assert "its pipeline file is not recorded" in text and "source: org/base" in text


@pytest.mark.parametrize(
    ("licenses", "name", "concern"),
    [
        ({"first": "MIT", "second": "CC-BY-SA-4.0"}, "cc-by-sa-4.0", None),
        ({"first": "CC-BY-NC-4.0", "second": "MIT"}, "cc-by-nc-4.0", "forbids commercial use"),
        ({"first": "MIT", "second": None}, "unknown", "a source's license is not known"),
        ({"first": "CC-BY-SA-4.0", "second": "GPL-3.0"}, "other", "do not fit under one"),
    ],
)
def test_the_strictest_license_of_base_and_data_is_stated(
    refused: Refused, licenses: dict[str, str | None], name: str, concern: str | None, tmp_path: Path
) -> None:
    ancestors = lineage(tmp_path, licenses=licenses)
    data, text = written(tmp_path, Facts("x", POLICY, None, ancestors))
    assert data["license"] == name
    assert (data.get("license_link"), data.get("license_name")) == (
        ("README.md#licenses", "terms-of-all-sources") if name == "other" else (None, None)
    )
    assert concern is None or concern in text
    data, text = written(tmp_path, Facts("x", POLICY, None, ancestors, license="Llama3.2"))
    assert data["license"] == "llama3.2" and "Stated by who exported it." in text
    refused(license_of, ancestors, "a\nb")


def test_base_model_is_not_teachers_or_reward_models(tmp_path: Path) -> None:
    model, data, sft, ppo = lineage(tmp_path, source="models/mine")
    model.record["config"]["revision"] = None
    config = {"source": "org/large", "revision": "c" * 40}
    large = artifact(tmp_path / "large", "model", Kind.MODEL, "8" * 64, config=config)
    ppo.record["inputs"] |= {"teacher": large.record["key"]}
    assert base_model([large, model, data, sft, ppo]) is None
    model.record["config"] = {"source": "org/base", "revision": "b" * 40}
    assert base_model([large, model, data, sft, ppo]) == "org/base"


def test_a_base_that_is_not_of_the_hub_is_not_named_as_one(tmp_path: Path) -> None:
    ancestors = lineage(tmp_path)
    assert base_model(ancestors) == "org/base"
    for config, expected in (
        ({"source": "smollm2-135m-instruct", "revision": None}, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ({"source": "models/base", "revision": None}, None), ({"source": "tiny"}, None),
    ):  # fmt: skip
        ancestors[0].record["config"] = config
        assert base_model(ancestors) == expected
    data, _ = written(tmp_path, Facts("x", POLICY, None, ancestors))
    assert "base_model" not in data and "base_model_relation" not in data


def test_a_folder_of_which_nothing_is_recorded(tmp_path: Path) -> None:
    data, text = written(tmp_path, Facts("x", POLICY, CHECKED))
    assert data["license"] == "unknown" and data["tags"] == ["align"]
    assert "It has no record of its training." in text and "## Recipe" not in text


def test_a_reward_model_has_its_pairs(tmp_path: Path) -> None:
    ancestors = lineage(tmp_path)[:3]
    ancestors.append(artifact(tmp_path / "reward", "reward", Kind.REWARD, "5" * 64))
    facts = Facts("x", REWARD, Agreement("scores", 8, 8), ancestors, **scored(tmp_path, full_card()))
    data, text = written(tmp_path, facts)
    assert data["pipeline_tag"] == "text-classification" and data["tags"] == ["align", "reward-model"]
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["name"].startswith("Pairs ordered as labeled (n 10, 95 % interval ")
    assert "AutoModelForSequenceClassification" in text and "apply_chat_template(turns, return_tensors" in text
    assert "| Pairs that taking the longer answer gets right |" in text


def hostile(root: Path) -> Facts:
    """Hostile text wherever text of others comes in."""
    ancestors = lineage(root, licenses={"first": HOSTILE, "second": "MIT"})
    ledger = json.loads((root / "data" / "ledger.json").read_text())
    ledger["sources"][0]["source"] = HOSTILE
    (root / "data" / "ledger.json").write_text(json.dumps(ledger))
    ancestors[-1].path.joinpath("events.jsonl").write_text(json.dumps({"event": "warning", "message": HOSTILE}) + "\n")
    ancestors[-1].record.update(platform=HOSTILE, command=HOSTILE, pipeline=HOSTILE, card_verb=HOSTILE)
    card = full_card()
    card["flags"] = [{"policy": "ppo", "kind": HOSTILE, "text": HOSTILE + "\n---\n# not a heading\n"}]
    card["gates"][0] |= {"system": "ppo", "passed": False, "text": HOSTILE}
    for task in card["tasks"].values():
        task["title"] = HOSTILE + "\n---\nlicense: mit"
    for metric in card["metrics"].values():
        metric["title"] = metric["unit"] = HOSTILE
    card["settings"]["engines"] = [HOSTILE]
    return Facts(HOSTILE + "\n---\n", POLICY, CHECKED, ancestors, {"description": HOSTILE}, **scored(root, card))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    data, text = written(tmp_path, hostile(tmp_path))
    assert data["license"] == "other", "no name or title rewrote the metadata"
    assert list(data)[:2] == ["base_model", "datasets"] and data["library_name"] == "transformers"
    outside = text
    for start, end in (("```sh\n", "\n```"), ("```yaml\n", "\n```"), ("```python\n", "\n```")):
        for piece in outside.split(start)[1:]:
            outside = outside.replace(piece.split(end)[0], "")
    assert "\\<script\\>" in outside
    for needle in ("<script", "<img", "</pre>", "<!--", "[a](", "`x`"):
        assert needle not in outside.replace("\\" + needle[0], "").replace("\\`", ""), needle
    assert "\n# not a heading" not in text and text.count("\n# ") == 1
    raw = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not [entry for entry in raw if entry in "\x00\x1b\u202e"]


def test_the_card_is_the_same_each_time(tmp_path: Path) -> None:
    facts = Facts("x", POLICY, CHECKED, lineage(tmp_path), **scored(tmp_path, full_card()))
    first = write_model_card(tmp_path, facts).read_bytes()
    assert write_model_card(tmp_path, facts).read_bytes() == first
