"""Reading of steps, tokens and reference passes from what align, trl and LLaMA-Factory leave."""

import json

import pytest

from benchmarks.training_peers.logs import (
    Loop,
    Step,
    loop_of_events,
    loop_of_output,
    read_align,
    reference_seconds,
)


def step_event(time, done, tokens, loss=0.7):
    return {
        "event": "progress",
        "time": time,
        "done": done,
        "total": 3,
        "unit": "steps",
        "tokens": tokens,
        "loss": loss,
    }


def reference_event(time, done):
    return {"event": "progress", "time": time, "done": done, "total": 16, "unit": "reference answers", "tokens": None}


def write_state(path, history):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"log_history": history}))


def test_first_step_does_not_count():
    loop = Loop([Step(100.0, 50, 0.7), Step(110.0, 90, 0.6), Step(114.0, 120, 0.5)])
    # 14 s between the ends of the first and the last step, in which 70 tokens were read
    assert loop.seconds_per_token == pytest.approx(14 / 70)
    assert loop.tokens == 120


def test_reference_pass_counts_over_all_tokens():
    loop = Loop([Step(0.0, 50, 0.7), Step(7.0, 120, 0.6)], reference_seconds=12.0)
    assert loop.seconds_per_token == pytest.approx(7 / 70 + 12 / 120)


def test_events_of_align_have_steps_and_reference():
    events = [
        {"event": "warning", "time": 1.0, "message": "a finding"},
        reference_event(10.0, 0),
        reference_event(14.0, 8),
        reference_event(16.0, 16),
        {"event": "note", "time": 17.0, "message": "lora r16"},
        {"event": "metrics", "time": 29.9, "step": 1, "loss": 0.7},
        {"event": "progress", "time": 29.0, "done": 0, "total": 2, "unit": "steps", "tokens": 0},
        step_event(30.0, 1, 100, 0.7),
        step_event(35.0, 2, 220, 0.65),
    ]
    loop = loop_of_events(events)
    assert loop.steps == [Step(30.0, 100, 0.7), Step(35.0, 220, 0.65)]
    assert loop.reference_seconds == pytest.approx(6.0)


def test_two_reference_passes_add_up():
    events = [reference_event(0.0, 0), reference_event(4.0, 16), reference_event(9.0, 0), reference_event(12.0, 16)]
    assert reference_seconds(events) == pytest.approx(7.0)


def test_reference_pass_starts_at_previous_event():
    events = [{"event": "note", "time": 2.0, "message": "rows"}, reference_event(10.0, 8), reference_event(12.0, 16)]
    assert reference_seconds(events) == pytest.approx(10.0)


def test_reference_pass_without_any_event_before_it_is_refused(refused):
    refused(lambda: reference_seconds([reference_event(10.0, 8)]))


def test_align_without_a_finished_stage_is_refused(refused, tmp_path):
    refused(read_align, tmp_path, "dpo")


def test_events_are_read_from_the_store(tmp_path):
    folder = tmp_path / "store" / "sft" / "0123456789ab"
    folder.mkdir(parents=True)
    lines = [json.dumps(step_event(1.0, 1, 10)), json.dumps(step_event(3.0, 2, 30))]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert read_align(tmp_path, "sft").seconds_per_token == pytest.approx(2 / 20)


def test_output_of_trl_is_timed_by_line_and_counted_by_state(tmp_path):
    lines = [
        (1.0, "Loading weights: 100%"),
        (20.0, "{'loss': '1.9', 'grad_norm': '0.5', 'learning_rate': '2e-05', 'num_tokens': '1.43e+04'}"),
        (30.0, " 50%|#####     | 2/4 [00:10<00:10] {'loss': '1.5', 'grad_norm': '0.4', 'num_tokens': '2.86e+04'}"),
        (31.0, "{'train_runtime': '31', 'train_loss': '1.7'}"),
    ]
    history = [{"step": 1, "loss": 1.9, "num_tokens": 14301}, {"step": 2, "loss": 1.5, "num_tokens": 28619}]
    # An older checkpoint is not read.
    write_state(tmp_path / "checkpoint-9" / "trainer_state.json", history[:1])
    write_state(tmp_path / "checkpoint-10" / "trainer_state.json", [*history, {"step": 2, "train_runtime": 31.0}])
    loop = loop_of_output(lines, tmp_path)
    assert loop.steps == [Step(20.0, 14301, 1.9), Step(30.0, 28619, 1.5)]
    assert loop.reference_seconds == 0.0


def test_state_in_the_output_folder_comes_first(tmp_path):
    entries = [{"step": n, "loss": 1.0, "num_input_tokens_seen": 10 * n} for n in (1, 2)]
    write_state(tmp_path / "trainer_state.json", entries)
    write_state(tmp_path / "checkpoint-2" / "trainer_state.json", [])
    lines = [(1.0, "{'loss': 1.0, 'epoch': 0.5}"), (2.0, "{'loss': 1.0, 'epoch': 1.0}")]
    assert loop_of_output(lines, tmp_path).tokens == 20


def test_lines_that_only_look_like_a_log_are_passed_over(tmp_path):
    entries = [{"step": n, "loss": 1.0, "num_tokens": 10 * n} for n in (1, 2)]
    write_state(tmp_path / "trainer_state.json", entries)
    lines = [(0.5, "{'loss': broken"), (1.0, "{'loss': '1.0'}"), (2.0, "{'loss': '1.0'}"), (3.0, "{'loss': 'sigmoid'}")]
    assert [step.time for step in loop_of_output(lines, tmp_path).steps] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("printed", "history"),
    [
        (1, [{"loss": 1.0, "num_tokens": 5}, {"loss": 1.0, "num_tokens": 9}]),
        (2, [{"loss": 1.0}, {"loss": 1.0}]),
        (1, [{"loss": 1.0, "num_tokens": 5}]),
        (2, [{"loss": 1.0, "num_tokens": 5}, {"loss": 1.0, "num_tokens": 5}]),
    ],
)
def test_a_run_that_cannot_be_measured_is_refused(refused, tmp_path, printed, history):
    write_state(tmp_path / "trainer_state.json", history)
    refused(lambda: loop_of_output([(float(n), "{'loss': '1.0'}") for n in range(printed)], tmp_path))


def test_output_without_a_state_is_refused(refused, tmp_path):
    refused(loop_of_output, [(1.0, "{'loss': '1.0'}")], tmp_path)


def test_llamafactory_log_counts_without_saved_model(tmp_path):
    entries = [{"current_steps": n, "loss": 0.7, "total_tokens": 40 * n} for n in (1, 2)]
    text = "".join(json.dumps(entry) + "\n" for entry in [*entries, {"current_steps": 2, "total_steps": 2}])
    (tmp_path / "trainer_log.jsonl").write_text(text)
    loop = loop_of_output([(1.0, "{'loss': '0.7'}"), (3.0, "{'loss': '0.7'}")], tmp_path)
    assert [step.tokens for step in loop.steps] == [40, 80]
