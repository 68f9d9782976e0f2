"""Curves from event files: resumed steps, damage, thinning, panels."""

import json

from align.report.page.metric_series import MAX_POINTS, average_to, group_by_panel, read_events


def test_a_resumed_step_counts_once_and_damage_is_skipped(tmp_path):
    events = [
        {"event": "metrics", "time": 1, "step": 2, "loss": 5.0},
        {"event": "metrics", "time": 1, "step": 1, "loss": 9.0, "note": "text", "nan": float("nan")},
        {"event": "metrics", "time": 2, "step": 2, "loss": 4.0},
        {"event": "progress", "done": 1, "loss": 77},
        {"event": "warning", "message": "w"},
        {"event": "note", "message": "n"},
        {"event": "warning", "message": "w"},
        {"event": "note", "message": "n"},
    ]
    text = "\n".join(json.dumps(event) for event in events) + '\n{"event": "metr\n[1]\n'
    (tmp_path / "events.jsonl").write_text(text)
    reported = read_events(tmp_path)
    assert reported.series == {"loss": ([1.0, 2.0], [9.0, 4.0])}
    assert (reported.warnings, reported.notes) == (["w"], ["n"])
    assert read_events(tmp_path / "nowhere").series == {}


def test_long_curves_are_averaged():
    steps, values = average_to(list(range(10_000)), [float(i % 2) for i in range(10_000)])
    assert len(steps) <= MAX_POINTS
    assert set(values) <= {0.48, 0.5, 0.52}
    assert (steps[0], steps[1]) == (12, 37)  # middles of runs of 25


def test_what_an_average_hides_is_kept(tmp_path):
    values = [0.0] * 1000
    values[501] = 9.0  # a spike of one step
    lines = [json.dumps({"event": "metrics", "step": step, "loss": value}) for step, value in enumerate(values)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    reported = read_events(tmp_path)
    low, high = reported.spread["loss"]
    assert max(reported.series["loss"][1]) == 3.0
    assert (max(high), max(low)) == (9.0, 0.0)
    assert len(low) == len(high) == len(reported.series["loss"][0])
    assert reported.logged["loss"] == 1000


def test_held_out_shares_the_panel_and_loss_comes_first():
    names = ["learning_rate", "test_margin", "zebra", "rewards/margins", "test_loss", "loss", "test_ndcg", "grad_norm"]
    assert group_by_panel(dict.fromkeys(names)) == [
        ("loss", ["loss", "test_loss"]),
        ("rewards/margins", ["rewards/margins", "test_margin"]),
        ("learning_rate", ["learning_rate"]),
        ("grad_norm", ["grad_norm"]),
        ("test_ndcg", ["test_ndcg"]),
        ("zebra", ["zebra"]),
    ]


def test_episode_curves_come_first_and_turns_share_panels():
    turns = [f"score_turn_{turn}" for turn in range(14, 0, -1)]
    names = ["policy_loss", "prefix_hit_rate", "tool_errors", *turns, "calls", "turns", "kl", "score_form", "score"]
    assert group_by_panel(dict.fromkeys(names)) == [
        ("score", ["score"]),
        ("score_form", ["score_form"]),
        ("score_turn_1 to 6", [f"score_turn_{turn}" for turn in range(1, 7)]),
        ("score_turn_7 to 12", [f"score_turn_{turn}" for turn in range(7, 13)]),
        ("score_turn_13 to 14", ["score_turn_13", "score_turn_14"]),
        ("kl", ["kl"]),
        ("turns", ["turns"]),
        ("calls", ["calls"]),
        ("tool_errors", ["tool_errors"]),
        ("prefix_hit_rate", ["prefix_hit_rate"]),
        ("policy_loss", ["policy_loss"]),
    ]
    assert group_by_panel({"score_turn_1": 0}) == [("score_turn_1", ["score_turn_1"])]


def test_metrics_of_tasks_come_before_details():
    names = ("zloss", "evaluation_share", "gsm8k.final", "kl", "loss")
    titles = [title for title, _ in group_by_panel({name: ([0.0, 1.0], [0.0, 1.0]) for name in names})]
    assert titles == ["loss", "gsm8k.final", "kl", "evaluation_share", "zloss"]
