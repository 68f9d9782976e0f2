"""Order in which an evaluation holds models: never two where one is enough, and none for another process."""

from types import SimpleNamespace

from align.evaluation.answers import Measured
from align.evaluation.evaluator import Evaluation
from align.evaluation.logprobs import LoadedModels
from align.evaluation.scorecard import SystemInfo
from align.evaluation.systems import Policy
from align.evaluation.tasks.base import Task


class Reads(Task):
    """A task that records what is loaded while it reads."""

    reads = True

    def __init__(self, name, models, log):
        self.name, self.models, self.log = name, models, log

    def read(self, reader):
        self.log.append((self.name, reader.info.name, list(self.models.models)))
        return Measured({})


class LoadsItself(Reads):
    loads_checkpoint = True


def test_tasks_with_own_process_read_when_no_model_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    tokenizer = SimpleNamespace(model_max_length=64)
    policies = [Policy(name, tmp_path, f"key {name}", tokenizer) for name in ("sft", "ppo")]
    models = LoadedModels(policies, "cpu", "float32")
    log = []
    plan = SimpleNamespace(
        systems=[
            SimpleNamespace(
                info=SystemInfo(policy.name, policy.name, "checkpoint", policy.key), name=policy.name, policy=policy
            )
            for policy in policies
        ],
        tasks=[LoadsItself("lm_eval", models, log), Reads("text", models, log)],
        reference="sft",
        base=None,
        precision="float32",
    )  # fmt: skip
    context = SimpleNamespace(
        inputs={}, checkpoints=tmp_path, cache=None, warn=print, seed=0, runtime=None, progress=lambda *_, **__: None
    )
    evaluation = Evaluation(context, plan)
    evaluation.models = models
    drift = SimpleNamespace(
        reading_order=lambda: policies, measure=lambda policy: models.models.update({policy.key: "loaded"})
    )
    measured = evaluation._read_with_checkpoints(drift)
    assert [entry[:2] for entry in log] == [("text", "sft"), ("text", "ppo"), ("lm_eval", "sft"), ("lm_eval", "ppo")]
    assert [entry[2] for entry in log[2:]] == [[], []]
    assert {task: list(by_system) for task, by_system in measured.items()} == {
        "lm_eval": ["sft", "ppo"],
        "text": ["sft", "ppo"],
    }
