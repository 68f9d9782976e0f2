"""Files of an evaluation whose systems have different metrics."""

import json
from types import SimpleNamespace

from align.data.rows import user
from align.evaluation.answers import ResponseSet, SystemResponses
from align.evaluation.scorecard.result_files import write
from align.evaluation.scorecard.scorecard_builder import Measurements
from align.inference.protocol import Response


def test_missing_metric_is_absent_only_from_that_systems_samples(tmp_path):
    names = ("sft", "ppo")
    plan = SimpleNamespace(
        rows=[{"id": "1", "source": "words", "prompt": [user("x")]}],
        systems=[SimpleNamespace(name=name, policy=SimpleNamespace(tokenizer=None)) for name in names],
        scorer=None,
        programs=[],
    )
    answer = ResponseSet("transformers", [[Response([7], [-1.0], True, "y")]])
    # A reward's own metric is there only where every response has it.
    measurements = Measurements(
        [], "sft", None, ["words"], {"sft": {"score": [[1.0]], "score_f_steps": [[2.0]]}, "ppo": {"score": [[0.5]]}},
        {"score": ("higher", "a sum"), "score_f_steps": (None, "a metric")},
    )  # fmt: skip
    responses = SystemResponses(prompt_set=dict.fromkeys(names, answer))
    write(tmp_path, plan, {}, responses, measurements=measurements, token_kl={})
    (line,) = map(json.loads, (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    assert line["responses"]["sft"][0]["scores"] == {"score": 1.0, "score_f_steps": 2.0}
    assert line["responses"]["ppo"][0]["scores"] == {"score": 0.5}
