"""Data ledgers and licenses on the page: numbers of every step, no texts of rows, unknown licenses marked."""

import json

from align.report.run import data_ledgers
from align.report.run.stage_costs import device, endpoint_cost, totals
from align.store.artifacts import Kind
from tests.support.report.example_run import FORMULA


def test_steps_sources_and_reasons(full_run):
    artifacts, _ = full_run
    data, answers = data_ledgers.data_sections(artifacts)
    assert data["splits"] == {"train": 30, "test": 3}
    assert [(step["step"], step["rows_in"], step["lost"], step["rows_out"]) for step in data["steps"]] == [
        ("0 read", 40, 0, 40), ("1 filter", 40, 7, 33),
    ]  # fmt: skip
    assert data["steps"][1]["width"] == 82.5
    assert [(reason["reason"], reason["rows"]) for reason in data["steps"][1]["reasons"]] == [
        ("too long", 5),
        (FORMULA, 2),
    ]
    assert [(source["source"], source["license"], source["lost"]) for source in data["sources"]] == [
        ("words", "cc-by-4.0", 5), ("<b>lists</b>", "unknown", 2),
    ]  # fmt: skip
    assert "a private text" not in json.dumps(data)
    assert [(step["step"], step["lost"]) for step in answers["steps"]] == [("answers", 3)]  # a synthesis ledger
    assert answers["splits"] == {"train": 8, "test": 1}


def test_a_stage_without_a_ledger_shows_what_it_counted(make_artifact):
    sample = make_artifact("sample", Kind.PREFERENCES, metrics={"train_rows": 9, "test_rows": 1, "eos_rate": 0.5})
    (section,) = data_ledgers.data_sections([sample])
    assert section["splits"] == {"train": 9, "test": 1}
    assert ("eos_rate", 0.5) in section["counts"]
    assert section["steps"] == []


def test_a_damaged_ledger_is_no_error(make_artifact):
    data = make_artifact("data", Kind.INSTRUCTIONS)
    (data.path / "ledger.json").write_text("[1", encoding="utf-8")
    assert data_ledgers.data_sections([data])[0]["steps"] == []
    assert data_ledgers.license_rows([data]) == []


def test_licenses_of_data_and_models(full_run):
    rows = data_ledgers.license_rows(full_run[0])
    assert [(row["what"], row["name"], row["license"]) for row in rows] == [
        ("model", "smollm2-135m-instruct", "apache-2.0"),
        ("data", "words", "cc-by-4.0"),
        ("data", "<b>lists</b>", "unknown"),
    ]
    license = data_ledgers.data_license(rows)
    assert license is not None
    assert license.names == ("unknown",)
    assert data_ledgers.data_license(rows[:1]) is None


def test_a_model_s_own_card_states_its_license(tmp_path):
    assert data_ledgers.model_license(tmp_path, "some/model") == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# A model\n")
    assert data_ledgers.model_license(tmp_path, "some/model") == "mit"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert data_ledgers.model_license(tmp_path, "some/model") == "unknown"
    assert data_ledgers.model_license(tmp_path, "tiny") == data_ledgers.MADE_HERE


def test_costs_are_summed_and_engines_named(full_run):
    artifacts, _ = full_run
    assert totals(artifacts)["cost"] == 0.25
    assert totals(artifacts)["seconds"] == 7 * 83.0
    assert totals(artifacts[:1])["cost"] is None
    assert device(artifacts[2].record) == "linux x86_64, 2 cores, vllm"
    assert endpoint_cost({"metrics": {"cost": True}}) is None
