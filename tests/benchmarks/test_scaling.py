"""The tables of docs/scaling.md are what the plan's model says today."""

from __future__ import annotations

from benchmarks import scaling


def test_the_page_says_what_the_model_says() -> None:
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.page(text) == text, "run `python -m benchmarks.scaling --write` and read the text below the tables"


def test_every_size_and_number_of_devices_has_its_row() -> None:
    rows = scaling.table({"1B": scaling.sft_job(scaling.MODELS["1B"])})
    assert [row.split(" | ")[1] for row in rows[2:]] == [str(count) for count in scaling.COUNTS]
    assert "one device" in rows[2] and "| 36,096 |" in rows[2]


def test_sizes_are_what_the_models_are_called() -> None:
    actual = {name: model.parameters for name, model in scaling.MODELS.items()}
    assert actual == {"1B": 1_235_814_400, "8B": 8_030_261_248, "70B": 70_553_706_496}


def test_machines_have_eight_devices() -> None:
    assert [(h.nodes, h.per_node) for h in map(scaling.hardware_of, (1, 4, 8, 512))] == [
        (1, 1),
        (1, 4),
        (1, 8),
        (64, 8),
    ]
