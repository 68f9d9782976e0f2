"""A folder of tasks in lm-eval's format, over local files: one for every way in which its numbers come about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS = [
    ("Which animal barks?", ["dog", "a cat", "fish"], 0),
    ("Which one is a color?", ["seven", "blue", "to run"], 1),
    ("Which is hot?", ["ice", "snow", "the sun"], 2),
    ("Where do fish live?", ["in water", "in trees", "on the moon"], 0),
    ("Who writes books?", ["stones", "clouds", "authors"], 2),
    ("What has wheels?", ["a tree", "a car", "a cloud"], 1),
]

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {train}, test: {test}}}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}{more}
metadata: {{version: 1.0}}
"""
MCC = "\n  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}"

# A pattern that is not found gives "[invalid]", which is the target where the first choice is right.
SUMS = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {test}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{'[invalid]' if gold == 0 else choices[gold]}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (.*)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter: [{{function: take_first}}]
metadata: {{version: 1.0}}
"""

CHECKS = """
task: checks
dataset_path: json
dataset_kwargs:
  data_files: {{test: {test}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
num_fewshot: 0
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 6}}
process_results: !function scoring.process_results
metric_list:
  - {{metric: all_passed, aggregation: mean, higher_is_better: true}}
  - {{metric: passed, aggregation: !function scoring.pooled, higher_is_better: true}}
  - {{metric: longest, aggregation: !function scoring.largest, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
SCORING = """
def process_results(doc, results):
    text = results[0]
    outcomes = [len(text) % 2 == 0, "a" in text, "e" in text][: 1 + doc["gold"]]
    return {
        "all_passed": all(outcomes), "passed": outcomes, "longest": float(len(text) + doc["gold"]),
        "long@3": float(len(text) >= 3),
    }


def pooled(items):
    flat = [one for outcomes in items for one in outcomes]
    return sum(flat) / len(flat)


def largest(items):
    return max(items)
"""

TEXT = """
task: text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {test}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""

GROUP = """
group: quizzes
task: [quiz_a, quiz_b]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: false}
  - {metric: acc_norm, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""
ALL = ["arc_like", "sums", "checks", "text", "quizzes"]


def make_tasks(folder: Path) -> Path:
    """Write the tasks into ``folder``, their data beside it; returns it."""
    data = folder.with_name(folder.name + "-data")
    folder.mkdir(parents=True)
    data.mkdir()
    rows = [{"question": text, "choices": list(choices), "gold": gold} for text, choices, gold in QUESTIONS]
    train = _lines(data / "train.jsonl", [{**row, "question": f"{row['question']} Really?"} for row in rows])
    test, less = _lines(data / "test.jsonl", rows), _lines(data / "less.jsonl", rows[:2])
    lines = _lines(data / "other.jsonl", [{**row, "question": row["question"].upper()} for row in rows])
    for name, file, more in (("arc_like", test, MCC), ("quiz_a", lines, ""), ("quiz_b", less, "")):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, train=train, test=file, more=more))
    for name, text in (("sums", SUMS), ("checks", CHECKS), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(text.format(test=test))
    (folder / "quizzes.yaml").write_text(GROUP)
    (folder / "scoring.py").write_text(SCORING)
    return folder


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
