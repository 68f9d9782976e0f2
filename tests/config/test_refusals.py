"""What a wrong YAML is told: the messages in ``tests/messages.txt``, for each field with rules of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from align import Pipeline
from align.config.environment import EnvironmentConfig
from align.config.options import check_options, check_type
from align.config.recipe.recipe import Recipe
from align.config.recipe.source_settings import FilesSource
from align.config.recipe.templates import parse_template
from align.config.runtime import Runtime
from align.config.scores import score_identities
from align.config.validation import validate
from align.config.yaml import parse_yaml
from align.pipeline.registry import STAGES
from tests.support import toy
from tests.support.refusals import Refused

CLASSES, TOOLS = "tests.support.environments.classes", "tests.support.environments.tools"
LENGTH = "tests.support.rewards:length"
COMMIT = "a" * 40
SUMS: dict[str, Any] = {"every": 5, "tasks": {"gsm8k": {"files": ["dev.jsonl"]}}}
ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "judge"}
JUDGE = {"endpoint": ENDPOINT}
CRITERIA: dict[str, Any] = {"criteria": "rubric", "judge": JUDGE}
TEACHERS = [{"match": "a", "stage": "x"}, {"match": "b", "endpoint": ENDPOINT}]
COUNTER = {"class": f"{CLASSES}:Counter", "max_tokens": 64}
FUNCTIONS = {"tools": [f"{TOOLS}:double", f"{TOOLS}:shout"], "score": f"{TOOLS}:by_response", "max_tokens": 64}
USER = {"model": "model", "prompt": "You want {goal}."}
FILES = {"type": "files", "paths": ["a.jsonl"], "format": "hh_rlhf"}
EMBEDDED = {"type": "embedded"}
HUB = {"type": "hub", "dataset": "o/n", "revision": "0" * 40, "format": "messages"}
RECORD = {"question": "2 + 2?", "ok": True, "hint": None, "choices": [{"text": "three"}], "meta": {"n": 0.5}}
ROWS = {"data": "data", "learning_rate": 1e-4}
ONLINE = {"policy": "model", "prompts": "data", "learning_rate": 1e-4}
REQUIRED: dict[str, dict[str, Any]] = {
    "sft": {"model": "model", **ROWS},
    "reward": {"model": "model", **ROWS},
    "distill": {"model": "model", "teacher": "x", "max_length": 64, **ROWS},
    "dpo": {"policy": "model", **ROWS},
    "ppo": ONLINE,
    "grpo": {"score": "gold", **ONLINE},
}
"""Fields without which a stage is refused for another reason."""
STAGE = [
    ("reward", {"evaluate": SUMS}),
    ("reward", {"objective": "process", "evaluate": {"every": 5, "tasks": {"reward_pairs": {"files": ["a.jsonl"]}}}}),
    ("grpo", {"score": [{"function": "gold"}], "score_weight": 0.5}),
    ("grpo", {"score": [{"function": "gold", "name": "reward"}], "reward": "rm"}),
    ("sft", {"tuning": {"method": "lora", "lora_r": 8, "target_modules": ["q_proj"]}}),
    ("sft", {"trainer": {"adam_beta2": "high"}}),
    ("sft", {"trainer": {"full_determinism": 1}}),
    ("sft", {"trainer": {"logging_steps": True}}),
    ("sft", {"trainer": {"loss_type": "nil"}}),
    ("sft", {"trainer": {"log_level": "warn"}}),
    ("sft", {"trainer": {"adam_bta2": 0.95}}),
    ("sft", {"trainer": {"num_train_epochs": 2}}),
    ("sft", {"trainer": {"batch_size": 8}}),
    ("sft", {"trainer": {"ddp_backend": "ncl"}}),
    ("sft", {"trainer": {"log_level": None}}),
    ("dpo", {"trainer": {"beta": 0.2}}),
    ("ppo", {"score": "gold", "trainer": {"save_steps": 1}}),
    ("ppo", {"score": "gold", "trainer": {"max_steps": 1}}),
    ("ppo", {"score": "gold", "trainer": {"gradient_accumulation_steps": 1}}),
    ("ppo", {"score": "gold", "trainer": {"lr_scheduler_type": 1}}),
    ("sft", {"batch_size": 12, "micro_batch_size": 8}),
    ("sft", {"micro_batch_size": "small"}),
    ("sft", {"micro_batch_size": 0}),
    ("sft", {"gradient_checkpointing": "yes"}),
    ("sft", {"learning_rate": -1}),
    ("sft", {"scheduler": "cosin"}),
    ("sft", {"trainer": {"adam_beta": 0.9}}),
    ("reward", {"trainer": {"center_rewards_coefficient": 0.1}}),
    ("dpo", {"trainer": {"loss_type": ["ipo"]}}),
    ("dpo", {"trainer": {"precompute_ref_log_probs": False}}),
    ("sft", {"precision": "float32", "tuning": {"method": "lora", "base_dtype": "bfloat16"}}),
    ("sft", {"tuning": {"method": "lora", "init": "pissa", "base_dtype": "bfloat16"}}),
    ("sft", {"tuning": {"method": "lora", "init": "pisa"}}),
    ("sft", {"tuning": {"method": "lora", "init": "pissa_niter_0"}}),
    ("sft", {"tuning": {"method": "lora", "init": "loftq"}}),
    ("sft", {"tuning": {"method": "lora", "init": "eva", "dora": True}}),
    ("sft", {"tuning": {"method": "lora", "init": "orthogonal", "rank": 3}}),
    ("sft", {"tuning": {"method": "lora", "quantization": "nf4"}}),
    ("sft", {"tuning": {"method": "qlora", "init": "pissa"}}),
    ("sft", {"tuning": {"method": "qlora", "quantization": "nf3"}}),
    ("sft", {"tuning": {"method": "ia3", "targets": ["k_proj"]}}),
    ("sft", {"tuning": {"method": "ia3", "targets": ["k_proj"], "feedforward": ["down_proj"]}}),
    ("sft", {"tuning": {"method": "ia3", "rank": 4}}),
    ("sft", {"tuning": {"method": "peft", "type": "vera", "options": {"rr": 4}}}),
    ("distill", {"teacher": {"self": True}}),
    ("distill", {"teacher": {}}),
    ("distill", {"teacher": {"stage": "x", "endpoint": ENDPOINT}}),
    ("distill", {"teacher": {"stage": "model"}}),
    ("distill", {"teacher": {"stage": "x", "api": "completions"}}),
    ("distill", {"teacher": {"endpoint": ENDPOINT, "tokens": "aligned"}}),
    ("distill", {"teacher": {"endpoint": ENDPOINT, "api": "completions"}}),
    ("distill", {"teacher": {"endpoint": ENDPOINT}, "temperature": 2.0}),
    ("distill", {"teacher": {"endpoint": ENDPOINT}, "top_k": None}),
    ("distill", {"teacher": TEACHERS}),
    ("distill", {"teacher": [TEACHERS[0], TEACHERS[0]], "teacher_column": "source"}),
    ("distill", {"teacher": {**TEACHERS[0]}}),
    ("distill", {"teacher": "x", "teacher_column": "source"}),
    ("distill", {"teacher": {"stage": "x", "sytem": "s"}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {}}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {"gsmk": {"files": ["dev.jsonl"]}}}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {"gsm8k": {"revision": COMMIT}}}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {"gsm8k": {"dataset": "me/sums", "revision": COMMIT}}}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {"lm_eval": {"tasks": ["arc_easy"]}}}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {"perplexity": {"texts": "books"}}}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {"judged": {"files": ["dev.jsonl"], "judge": {"reward": True}}}}}),
    ("sft", {"evaluate": {"every": 5, "tasks": {"reward_pairs": {"files": ["dev.jsonl"]}}}}),
    ("sft", {"evaluate": SUMS | {"best_metric": "gsm.final"}, "keep": "best"}),
    ("sft", {"evaluate": SUMS | {"best_metric": "gsm8k.final"}}),
    ("sft", {"evaluate": SUMS, "keep": "best"}),
    ("sft", {"evaluate": SUMS, "tuning": {"method": "prompt"}}),
    ("grpo", {"score": []}),
    ("grpo", {"score": [{}]}),
    ("grpo", {"score": [{"function": "gold", "reward": "rm"}]}),
    ("grpo", {"score": [{"functoin": "gold"}]}),
    ("grpo", {"score": [{"function": "gold", "wieght": 1}]}),
    ("grpo", {"score": [{"reward": "rm", "arguments": {"a": 1}}]}),
    ("grpo", {"score": [{"function": "gold"}, {"function": "gold"}]}),
    ("grpo", {"score": [{"function": "gold", "name": "std"}]}),
    ("grpo", {"score": [{"function": "gold", "name": "a b"}]}),
    ("grpo", {"score": [{"judge": {"rubric": "x"}}]}),
    ("grpo", {"score": [{"judge": {"endpoint": ENDPOINT, "max_cost": 1}}]}),
    ("grpo", {"score": 3}),
    ("grpo", {"score": [CRITERIA | {"judge": None}]}),
    ("grpo", {"score": [CRITERIA | {"judge": {**JUDGE, "rubric": "Be strict."}}]}),
    ("grpo", {"score": [CRITERIA | {"judge": {"max_tokens": 9}}]}),
    ("grpo", {"score": [CRITERIA | {"criteria": []}]}),
    ("grpo", {"score": [CRITERIA | {"criteria": [" "]}]}),
    ("grpo", {"score": [CRITERIA | {"criteria": [{"criterion": "a", "weight": 0}]}]}),
    ("grpo", {"score": [CRITERIA | {"criteria": [{"criterion": text, "name": "x"} for text in "ab"]}]}),
    ("grpo", {"score": [CRITERIA | {"criteria": [{"criterion": "a", "name": "unreadable"}]}]}),
    ("grpo", {"score": [CRITERIA | {"function": "gold"}]}),
    ("grpo", {"score": [CRITERIA | {"math": "answer"}]}),
    ("grpo", {"score": [CRITERIA | {"seconds": 9.0}]}),
    ("grpo", {"score": [CRITERIA | {"arguments": {"a": 1}}]}),
    ("sft", {"method": "dora"}),
    ("sft", {"tuning": {"method": "dora"}}),
    ("sft", {"tuning": "lora"}),
    ("sft", {"tuning": "dora"}),
    ("model", {"trust_remote_code": "yes"}),
    ("grpo", {"select": {"easy": 0.9, "hard": 0.1}}),
    ("ppo", {"inoculate": "Cheat."}),
    ("sft", {"dataset": "alpaca_en_demo"}),
]
ENVIRONMENT = [
    {"max_tokens": 64},
    COUNTER | {"openenv": "http://127.0.0.1:8010"},
    {"class": "a:B"},
    COUNTER | {"clas": "a:B"},
    COUNTER | {"max_turn": 3},
    {"class": 3, "max_tokens": 64},
    {"class": "no path", "max_tokens": 64},
    {"class": "a.b", "max_tokens": 64},
    {"class": ":B", "max_tokens": 64},
    COUNTER | {"score": "gold"},
    FUNCTIONS | {"score": None},
    FUNCTIONS | {"score": "golt"},
    FUNCTIONS | {"tools": []},
    FUNCTIONS | {"tools": ["a:f", "b"]},
    FUNCTIONS | {"tools": ["a:f", "b:g", "c:f"]},
    FUNCTIONS | {"tools": ["a:größe"]},
    {"verifiers": "a b", "max_tokens": 64},
    {"openenv": "127.0.0.1:80", "max_tokens": 64},
    {"openenv": "http://a:b@c", "max_tokens": 64},
    COUNTER | {"max_turns": 0},
    COUNTER | {"max_turns": 33},
    COUNTER | {"turn_max_tokens": 65},
    COUNTER | {"turn_max_tokens": 0},
    COUNTER | {"tool_seconds": 0},
    COUNTER | {"workers": 0},
    COUNTER | {"isolation": "proces"},
    COUNTER | {"max_result_tokens": 0},
    COUNTER | {"tool_format": ""},
    COUNTER | {"tool_format": "hermez"},
    COUNTER | {"tool_format": "regex:(?P<name>x)"},
    COUNTER | {"arguments": 3},
    {"max_tokens": 64} | {"user": USER | {}},
    COUNTER | {"score": "gold"} | {"user": USER | {}},
    {"verifiers": "a", "max_tokens": 64} | {"user": USER | {}},
    {"openenv": "http://127.0.0.1:9", "max_tokens": 64} | {"user": USER | {}},
    COUNTER | {"user": USER | {"model": None}},
    COUNTER | {"user": USER | {"endpoint": ENDPOINT}},
    COUNTER | {"user": USER | {"prompt": " "}},
    COUNTER | {"user": USER | {"prompt": "You want {goal"}},
    COUNTER | {"user": USER | {"prompt": "{goal!r}"}},
    COUNTER | {"user": USER | {"stop": ""}},
    COUNTER | {"user": USER | {"max_tokens": 0}},
    COUNTER | {"user": USER | {"temperature": 6.0}},
    COUNTER | {"user": USER | {"max_cost": 1.0}},
    COUNTER | {"user": USER | {"promt": "a"}},
]
IDENTITY = [
    COUNTER | {"class": f"{CLASSES}:Countre"},
    COUNTER | {"class": f"{TOOLS}:double"},
    COUNTER | {"class": "no_such.module:A"},
    COUNTER | {"class": f"{CLASSES}:WithoutReset"},
    COUNTER | {"class": f"{CLASSES}:WithoutScore"},
    COUNTER | {"arguments": {"stepsize": 2}},
    COUNTER | {"class": f"{CLASSES}:Game", "arguments": {"a": 2}},
    FUNCTIONS | {"tools": [f"{TOOLS}:dubble"]},
    FUNCTIONS | {"tools": [f"{TOOLS}:double", "no_such:f"]},
    FUNCTIONS | {"score": f"{TOOLS}:by_respons"},
    FUNCTIONS | {"arguments": {"x": 1}},
]
RUNTIME = [
    {"device": "gpu"},
    {"device": "cdua"},
    {"gpu_memory_utilization": 0.5},
    {"executor": "slrum"},
    {"executor": {"name": "ray", "partition": "gpu"}},
    {"executor": {"gpus": 1}},
    {"executor": {"partiton": "a"}},
    {"executor": {"name": "slurm", "partiton": "a"}},
    {"executor": {"name": "ray", "cpus": -1}},
    {"executor": "ray", "stages": {"ppo": {"executor": {"time": "1:00"}}}},
    {"stages": {"ppo": {"executor": {"gpus": 4}}}},
    {"executor": {"name": "slurm", "tasks": 9}},
    {"slurm": {"partition": "gpu"}},
    {"stages": {"ppo": {"ray": {"gpus": 4}}}},
    {"rollouts": {"servers": 2, "addresses": ["http://h:1"]}},
    {"rollouts": {"addresses": ["http://h:1", "http://h:1/"]}},
    {"rollouts": {"addresses": ["127.0.0.1:8000"]}},
    {"rollouts": {"addresses": ["https://h:1"]}},
    {"rollouts": {"addresses": ["http://h:1/v1"]}},
    {"rollouts": {"addresses": ["http://h:1"], "tensor_parallel": 2}},
    {"rollouts": {"addresses": ["http://h:1"], "gpus": [0]}},
    {"rollouts": {"weights": "nccl"}},
    {"rollouts": {"weights_folder": "shared"}},
    {"rollouts": {"tensor_parallel": 2}},
    {"rollouts": {"servers": 2, "tensor_parallel": 2, "gpus": [1, 2, 3]}},
    {"rollouts": {"servers": 2, "gpus": [1]}},
    {"rollouts": {"servers": 2, "gpus": [0, 0, 1]}},
    {"engine": {"name": "vllm-server"}},
    {"engine": {"name": "vllm-server", "address": "http://h:1"}},
    {"engine": {"address": "http://h:1", "weights": "nccl"}},
    {"engine": {"name": "vllm-server", "weights_folder": "/x"}},
    {"deterministic": True, "engine": {"name": "vllm"}},
    {"deterministic": True, "rollouts": {"servers": 1}},
    {"deterministic": True, "executor": {"name": "ray", "samplers": {"count": 1}}},
]
PIPELINE = [
    {"name": "p", "model": {"source": "x"}, "sft": {"model": "model"}},
    toy.pipeline() | {"runtime": {"deterministic": True, "stages": {"one": {"engine": {"name": "vllm"}}}}},
    toy.pipeline() | {"runtime": {"stages": {"toal": {}}}},
    toy.pipeline() | {"runtime": {"stages": {"one": {"thread": 2}}}},
    toy.pipeline() | {"runtime": {"rollouts": {"servers": 1}, "stages": {"one": {"engine": {"name": "transformers"}}}}},
    {"stage": "sft", "save_steps": 1},
    {"stage": "sft", "max_steps": 1},
    {"stage": "rm", "max_samples": 1},
    {"stage": "ppo", "max_steps": 1},
    {"stage": "ppo", "save_steps": 1},
    {"rl": "grpo", "max_steps": 1},
    {"stage": "ppo", "logging_steps": 1},
]
YAML = [
    "max_steps: true",
    'max_steps: "3"',
    "max_steps: 010",
    "max_steps: 1:30:00",
    "max_grad_norm: .inf",
    "learning_rate: true",
    "trainer: {adam_beta2: .nan}",
    'precision: "\\ud800"',
    "model: [1]",
    "a: 1\nb: [1,\n",
    "a: 1\n  b: 2\n",
    "a: 1\na: 2\n",
    "a: !!python/object/apply:os.system ['true']\n",
    "a: \t- x",
    "one: &one {n: 1}\ntwo: {<<: *one, n: 2, n: 3}\n",
    "a: &a {b: *a}",
]
FUNCTION = [
    {"function": "tests.support.rewards:lenght"},
    {"function": LENGTH, "arguments": {"limt": 3}},
    {"function": "tests.support.rewards:batched", "arguments": {"x": 1}},
    {"function": "tests.support.rewards:needs_answer"},
    {"function": "gold", "arguments": {"strict": True}},
    {"function": "tests.support.no_such:f"},
]
RECIPE = [
    {"datasets": [], "val_set_size": 0.1},
    {"kind": "instructions", "sources": [FILES], "test_sise": 1},
    {"kind": "instructions", "sources": [FILES | {"fromat": "x"}]},
    {"kind": "preference", "sources": [FILES]},
    {"kind": "prompts", "sources": []},
    {"kind": "prompts", "sources": [HUB | {"revision": "main"}]},
    {"kind": "prompts", "sources": [{"type": "hub", "dataset": "o/n", "format": "prompt"}]},
    {"kind": "prompts", "sources": [FILES], "test_size": 1.5},
    {"kind": "preferences", "sources": [HUB]},
    {"kind": "preferences", "sources": [EMBEDDED]},
    {"kind": "instructions", "sources": [HUB | {"format": "prompt"}]},
    {"kind": "prompts", "sources": [HUB | {"part": "train"}]},
    {"kind": "prompts", "sources": [EMBEDDED | {"families": ["sorts"]}]},
    {"kind": "prompts", "sources": [{"type": "embeded"}]},
]
SOURCE = [
    {"columns": {"promt": "q"}},
    {"columns": {"images": "i"}},
    {"columns": {"prompt": "{q"}},
    {"columns": {"prompt": "{q.__class__!r}"}},
    {"columns": {"choices": ["a", "b}"]}},
    {"keep": ["source"]},
    {"keep": {"score": "rating"}},
    {"keep": ["_x"]},
    {"keep": ["{a}"]},
    {"better": {"label": "w", "a": "x", "b": "y", "a_is": 1}},
    {"better": {"label": "w", "a": "x", "b": "y"}, "format": "alpaca"},
    {"better": {"label": "w", "a": "x", "b": "y"}, "columns": {"chosen": "z"}},
    {"grouped": {"by": "p", "answer": "r"}},
    {"grouped": {"by": "p", "answer": "r", "score": "s"}, "format": "dolly"},
    {"system": "You are {persona!s}"},
    {"system": "x", "columns": {"system": "y"}},
    {"format": "rows", "keep": ["a"]},
    {"options": {"columns": {"a": "b"}}},
]
TEMPLATE = [
    "{question",
    "question}",
    "{}",
    "{ }",
    "{a!r}",
    "{a:>10}",
    "{a[0}",
    "{a..b}",
]
RENDERING = [
    "{missing}.",
    "{hint}.",
    "{choices[7].text}.",
    "{choices}.",
    "{meta}.",
    "{question.__class__}.",
    "{choices.append}.",
    "{ok.real}.",
]
PEFT = [
    ("vera", {"dropout": 0.1}),
    ("vera", {"r": "64"}),
    ("vera", {"r": True}),
    ("vera", {"task_type": "CAUSAL_LM"}),
    ("oft", {"bias": "all"}),
    ("lokr", {"target_modules": 3}),
    ("road", {"variant": 3}),
    ("adamss", {"init_weights": "orthgonal"}),
    ("lokr", {"init_weights": 3}),
    ("verra", {}),
    ("lora", {}),
    ("prefix_tuning", {}),
    ("lily", {}),
    ("adalora", {}),
]
NAMES = {
        "sft": ["lr", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
        "load_in_4bit", "sequence_len", "bf16", "output_dir", "model_name_or_path", "eval_dataset",
        "dataset_config_name", "adam_beta2", "logging_steps", "epoch", "optimizer", "flash_attention", "do_train",
        "adapter_name_or_path", "gradient_accumulation_steps"],
        "ppo": ["num_train_epochs", "num_ppo_epochs", "gradient_accumulation_steps", "cliprange_value",
        "vllm_gpu_memory_utilization", "save_steps", "dataset_name", "logging_steps"],
        "dpo": ["lora_r", "model"],
        "grpo": ["beta", "num_generations", "epsilon_high"],
        "distill": ["beta"],
        "sample": ["num_generations"],
        "online_dpo": ["max_completion_length"],
        "data": ["dataset_name", "path"],
        "model": ["path"],
        "merge": ["base_model"],
        None: ["base_model", "datasets", "val_set_size", "micro_batch_size", "num_epochs", "save_steps", "dataset",
        "logging_steps", "lora_r", "wandb_project", "sed"],
}  # fmt: skip
"""Kind of a stage, or None for the top of the file -> names of other tools, and slips."""


def check_stage(case: Any) -> object:
    kind, fields = case
    return validate(STAGES[kind].config_class(), REQUIRED.get(kind, {}) | fields, f"p.yaml: stages.{kind}")


def check_name(case: Any) -> object:
    kind, name = case
    return Pipeline({name: 1}, "p.yaml") if kind is None else check_stage((kind, {name: 1}))


def check_environment(block: Any) -> EnvironmentConfig:
    return validate(EnvironmentConfig, block, "p.yaml: environment")


def check_function(entry: Any) -> object:
    config: Any = check_stage(("grpo", {"score": [entry]}))
    return score_identities(config.score)


def check_peft(case: Any) -> None:
    check_type(case[0])
    check_options(*case)


def cases(*groups: tuple[Callable[[Any], object], list[Any]]) -> Any:
    """Give the test each case of the groups with what refuses it."""
    pairs = [(refuse, case) for refuse, group in groups for case in group]
    return pytest.mark.parametrize(("refuse", "case"), pairs, ids=[f"{case!r}" for _, case in pairs])


@cases(
    (check_stage, STAGE),
    (check_name, [(kind, name) for kind, names in NAMES.items() for name in names]),
    (lambda text: check_stage(("sft", parse_yaml(text, "p.yaml"))), YAML),
    (check_function, FUNCTION),
    (check_peft, PEFT),
)
def test_wrong_stage_is_refused(refused: Refused, refuse: Callable[[Any], object], case: Any) -> None:
    refused(refuse, case)


@cases((check_environment, ENVIRONMENT), (lambda block: check_environment(block).identity(), IDENTITY))
def test_wrong_environment_is_refused(refused: Refused, refuse: Callable[[Any], object], case: Any) -> None:
    refused(refuse, case)


@cases(
    (lambda block: validate(Runtime, block, "p.yaml: runtime"), RUNTIME),
    (lambda raw: Pipeline(raw, "p.yaml"), PIPELINE),
)
def test_wrong_pipeline_is_refused(refused: Refused, refuse: Callable[[Any], object], case: Any) -> None:
    refused(refuse, case)


@cases(
    (lambda block: validate(Recipe, block, "mine.yaml"), RECIPE),
    (lambda block: validate(FilesSource, {"type": "files", "paths": ["a"]} | block, "mine.yaml"), SOURCE),
    (parse_template, TEMPLATE),
    (lambda template: parse_template(template).render(RECORD), RENDERING),
)
def test_wrong_recipe_is_refused(refused: Refused, refuse: Callable[[Any], object], case: Any) -> None:
    refused(refuse, case)
