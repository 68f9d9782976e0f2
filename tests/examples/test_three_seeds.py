"""``examples/three_seeds.py``: seeds share what they should, and the table and the plot have their numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align import Pipeline
from align.config.yaml import dump_yaml
from align.errors import UserError
from examples.three_seeds import main, measure, plot

SMOKE = "pipelines/smoke.yaml"
TINY = {
    "name": "seeds",
    "runtime": {"engine": {"name": "transformers"}},
    "stages": {
        "model": {"source": "tiny"},
        "data": {"recipe": str(Path("data_recipes/embedded.yaml").resolve()), "max_rows": 60},
        "sft": {"model": "model", "data": "data", "learning_rate": 3e-3, "max_steps": 2, "max_length": 256},
        "evaluate": {
            "policies": ["model", "sft"], "reference": "model", "prompts": "data",
            "score": "examples.scorers:letters", "max_prompts": 4, "max_tokens": 4,
        },
    },
}  # fmt: skip


def summary(printed: str) -> dict[str, list[str]]:
    """Return the printed columns of each system."""
    return {cells[0]: cells[1:] for cells in map(str.split, printed.splitlines()) if len(cells) == 4}


def test_mean_and_deviation_are_printed_and_plotted(
    finished: list[Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([SMOKE, "--seeds", "1", "2", "4", "--plot", str(tmp_path / "seeds.png")])
    printed = capsys.readouterr().out
    assert "gold over seeds" in printed
    rows = summary(printed)
    # 0.1 per place in the list, 0.02 on average over the prompts, and 0.1 per seed for what is trained.
    assert rows["model"] == ["0.020", "0.000", "3"]
    assert rows["dpo"] == ["0.453", "0.153", "3"]
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")
    assert printed.splitlines()[-1] == f"Plot: {tmp_path / 'seeds.png'}"


def test_seeds_share_model_and_data_and_nothing_else(finished: list[Pipeline]) -> None:
    measure(Pipeline.load(SMOKE), [1, 2], ["model", "data"], None, None)
    first, second = finished
    assert (first.name, second.name) == ("smoke-seed-1", "smoke-seed-2")
    shared = {node.name for node in first if node.key == second.nodes[node.name].key}
    assert shared == {"model", "data"}
    assert shared == {node.name for node in Pipeline.load(SMOKE) if node.key == first.nodes[node.name].key}


def test_plot_has_bars_for_means_and_points_for_seeds(finished: list[Pipeline]) -> None:
    metric, scores = measure(Pipeline.load(SMOKE), [1, 2, 3], ["model", "data"], "reward", None)
    figure = plot(scores, metric)
    (axes,) = figure.axes
    bars, *points = axes.collections
    assert [label.get_text() for label in axes.get_xticklabels()] == ["model", "sft", "dpo", "ppo"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["seed 1", "seed 2", "seed 3"]
    by_seed = [list(point.get_offsets()[:, 1]) for point in points]
    for place, segment in enumerate(bars.get_segments()):
        values = [values[place] for values in by_seed]
        assert segment[0][1] == pytest.approx(sum(values) / 3)
        assert len(set(values)) == (1 if place == 0 else 3)


def test_a_metric_that_nothing_measures_is_refused(finished: list[Pipeline]) -> None:
    with pytest.raises(UserError, match="no metric 'rewrad'. Did you mean 'reward'"):
        main([SMOKE, "--metric", "rewrad", "--seeds", "1"])


def test_a_shared_stage_that_is_not_there_is_refused(finished: list[Pipeline]) -> None:
    with pytest.raises(UserError, match="no stage 'modle'. Did you mean 'model'"):
        main([SMOKE, "--share", "modle"])
    assert finished == []


@pytest.mark.slow
def test_three_seeds_train_and_differ(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_yaml(TINY))
    main([str(file), "--metric", "length", "--plot", str(tmp_path / "seeds.png")])
    printed = capsys.readouterr().out
    assert re.findall(r"▸ (\w+) +starts", printed) == ["model", "data", *["sft", "evaluate"] * 3]
    rows = summary(printed)
    assert rows["model"][2] == rows["sft"][2] == "3"
    main([str(file), "--metric", "letters", "--plot", str(tmp_path / "letters.png")])
    printed = capsys.readouterr().out
    assert "starts" not in printed
    assert float(summary(printed)["sft"][1]) > 0
