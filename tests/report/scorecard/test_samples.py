"""Samples of the page: order across tasks, room for numbers by token, rollouts of training, damaged files."""

import json

from align.report.page.templates import load_template
from align.report.scorecard.rollouts import SampleFile
from align.report.scorecard.samples import HUNDREDTHS, page_json, page_samples
from align.report.scorecard.stored_rollouts import read_rollouts, read_validations
from tests.support.report.example_card import POLICIES, full_card
from tests.support.report.example_run import prompt_samples, task_samples
from tests.support.stored_rollouts import write_lines

SAMPLES_MODULE = "align.report.scorecard.samples"


def test_a_change_counts_as_a_share_of_its_task_s_largest():
    def sample(task, name, **scores):
        responses = {system: [{"text": "", "tokens": 1, **numbers}] for system, numbers in scores.items()}
        return {"task": task, "prompt": "p", "id": name, "source": "s", "responses": responses}

    small = [
        sample("prompts", str(index), sft={"gold": 0.0}, ppo={"gold": gold}) for index, gold in enumerate((0.01, 0.04))
    ]
    large = [
        sample("mt", f"m{number}", sft={"scores": {"score": 1.0}}, ppo={"scores": {"score": score}})
        for number, score in enumerate((7.0, 9.0))
    ]
    page = page_samples(small + large, full_card())
    assert [item["id"] for item in page["items"]] == ["1", "m1", "m0", "0"]
    assert page["items"][1]["change"]["ppo"] == 8.0
    assert page["tasks"]["mt"] == {"title": "MT-Bench", "metric": "Judge's score", "key": "score"}


def test_numbers_by_token_go_with_the_largest_changes(monkeypatch):
    samples, card = list(prompt_samples(POLICIES, heat=True)), full_card()
    page = page_samples(samples, card)
    assert page["without_heat"] == 0
    first = page["items"][0]["answers"]["ppo"][0]["heat"]
    assert first["k"][:3] == [-HUNDREDTHS, -HUNDREDTHS // 2, 0]
    assert first["v"][:3] == [0, 10, 20]
    assert first["t"][0] == ""
    monkeypatch.setattr("align.report.scorecard.samples.MAX_HEAT_BYTES", 1_500)
    bounded = page_samples(samples, card)
    with_heat = ["heat" in item["answers"]["ppo"][0] for item in bounded["items"]]
    assert with_heat[0]
    assert 0 < sum(with_heat) < len(samples)
    assert bounded["without_heat"] == len(samples) - sum(with_heat)


def test_infinite_numbers_are_shown_as_missing():
    sample = next(prompt_samples(["sft"], heat=True))
    sample["responses"]["sft"][0] |= {
        "token_kl": [["a", None], ["b", float("nan")]],
        "token_value": [],
        "gold": float("nan"),
    }
    page = page_samples([sample], None)
    answer = page["items"][0]["answers"]["sft"][0]
    assert answer["heat"] == {"t": ["a", "b"], "k": [None, None]}
    assert answer["gold"] is None


def test_a_score_that_is_not_finite_makes_no_change():
    sample = next(prompt_samples(["sft", "ppo"], heat=False))
    sample["responses"]["sft"][0] |= {"gold": 0.5}
    sample["responses"]["ppo"][0] |= {"gold": float("nan")}
    (item,) = page_samples([sample], full_card())["items"]
    assert item["score"]["ppo"] is None
    assert "ppo" not in item["change"]


def test_pairs_of_reward_models_have_columns_by_side():
    def side(text, score):
        return [{"text": text, "finished": True, "scores": {"rm": score, "rm-b": None}}]

    sides = {"chosen": side("yes", 1.25), "rejected": side("no", -0.5)}
    pair = {"task": "hh", "prompt": "p", "id": "a:1", "source": "s", "columns": [*sides], "responses": sides}
    card = full_card()
    card["tasks"]["hh"] = {"title": "Reward-model pairs", "primary": "hh.", "metrics": [], "n": 1}
    card["reward_models"].append({"stage": "rm", "task": "hh"})
    page = page_samples([pair, *task_samples(["sft"])], card)
    item = page["items"][0]
    assert (item["columns"], item["score"]) == (["chosen", "rejected"], {"chosen": 1.25, "rejected": -0.5})
    assert item["answers"]["rejected"][0] == {"finished": True, "text": "no", "scores": {"rm": -0.5, "rm-b": None}}
    assert page["tasks"]["hh"] == {"title": "Reward-model pairs", "metric": "score by rm", "key": "rm"}
    assert page_samples([pair], card)["lengths"] == {}


def rollout(update, prompt, response, score=0.5):
    return {"update": update, "prompt": prompt, "response": response, "score": score, "tokens": 1, "finished": True}


def test_rollouts_are_spread_over_the_updates(tmp_path):
    prompt = [{"role": "user", "content": "q"}]
    lines = [rollout(update, prompt, f"r{update}") for update in range(1, 201)]
    lines = [line | {"by_token": [["r", 0.5, -0.25, 1.0]]} for line in lines]
    rollouts = read_rollouts(write_lines(tmp_path / "rollouts", lines))
    assert len(rollouts) == 48
    assert (rollouts[0]["update"], rollouts[-1]["update"]) == (1, 200)
    page = page_samples([], None, {"ppo": rollouts})
    item = page["items"][0]
    assert (item["source"], item["columns"]) == ("update 1", ["ppo"])
    assert item["answers"]["ppo"][0]["heat"] == {"t": ["r"], "k": [50], "v": [-25], "a": [100]}
    assert page["tasks"] == {"rollouts ppo": {"title": "rollouts of ppo", "metric": "score", "key": "score"}}


def test_responses_of_an_update_to_one_prompt_are_one_item(tmp_path):
    lines = [
        rollout(update, prompt, f"{prompt}{number}", number) | {"group": group, "round": 0}
        for update in range(1, 31)
        for group, prompt in enumerate("ab")
        for number in range(4)
    ]
    rollouts = read_rollouts(write_lines(tmp_path / "rollouts", lines))
    assert len(rollouts) == 48
    assert rollouts[-4:] == [
        {name: line[name] for name in line if name not in ("group", "round")} for line in lines[-4:]
    ]
    items = page_samples([], None, {"grpo": rollouts})["items"]
    assert len(items) == 12
    assert [turn["text"] for turn in items[0]["prompt"]] == ["a"]
    assert items[0]["columns"] == ["grpo 1", "grpo 2", "grpo 3", "grpo 4"]
    assert [items[0]["answers"][name][0]["text"] for name in items[0]["columns"]] == ["a0", "a1", "a2", "a3"]
    assert items[0]["score"] == {"grpo 1": 0, "grpo 2": 1, "grpo 3": 2, "grpo 4": 3}
    assert [item["source"] for item in (items[0], items[-1])] == ["update 1", "update 30"]


def test_validation_items_follow_a_prompt_through_the_updates(tmp_path):
    lines = [
        rollout(update, prompt, f"{prompt}{update}", update / 100) for update in range(0, 101, 5) for prompt in "pqrst"
    ]
    validations = read_validations(write_lines(tmp_path / "validations", lines))
    page = page_samples([], None, {}, {"ppo": validations})
    assert len(page["items"]) == 4  # the first prompts
    first, second, *_ = page["items"]
    assert len(first["columns"]) == 8
    assert (first["columns"][0], first["columns"][-1]) == ("before training", "after update 100")
    assert first["answers"]["after update 100"][0]["text"] == "p100" and first["score"]["after update 100"] == 1.0
    assert (first["source"], second["source"]) == ("prompt 1", "prompt 2")
    assert page["tasks"]["validation ppo"]["title"] == "validation of ppo, by update"
    assert read_validations(tmp_path / "none") == []


def test_damaged_files_of_rollouts_are_skipped(tmp_path):
    folder = write_lines(tmp_path / "rollouts", [rollout(1, "p", "r")])
    (folder / "000002.parquet").write_bytes(b"PAR1, and then something else")
    (folder / ".000003.parquet.draft").write_bytes(b"half a file")
    assert [line["response"] for line in read_rollouts(folder)] == ["r"]


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"prompt": [], "responses": {}}\n{"prompt": \n[1]\n{"id": 2}\n')
    assert len(list(SampleFile(path))) == 1
    assert list(SampleFile(tmp_path / "none")) == []


def test_file_of_samples_gives_the_page_of_a_list(tmp_path):
    samples = [*prompt_samples(POLICIES, heat=True), *task_samples(POLICIES)]
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps(sample) for sample in samples]
    # Characters of several bytes and damaged lines between them do not move the places of the others.
    lines[1:1] = ['{"prompt": "ä€", "respon', '{"id": "ö"}', ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert page_samples(SampleFile(path), full_card()) == page_samples(samples, full_card())
    file = SampleFile(path)
    assert list(file) == samples
    assert [file[index] for index in (2, 0, len(samples) - 1)] == [samples[2], samples[0], samples[-1]]


def test_only_samples_on_the_page_become_items(monkeypatch):
    samples = [*prompt_samples(POLICIES, heat=False)]
    responses = []
    monkeypatch.setattr(f"{SAMPLES_MODULE}.MAX_BYTES", 3_000)
    monkeypatch.setattr(
        f"{SAMPLES_MODULE}.answer_view", lambda response: responses.append(response) or {"text": "?" * 99}
    )
    page = page_samples(samples, full_card())
    shown = len(page["items"])
    assert 0 < shown < len(samples) - 5
    # The first sample that does not fit ends the page.
    assert len(responses) == (shown + 1) * len(POLICIES)
    assert page["left_out"] == len(samples) - shown
    assert len(page["lengths"]["prompts"]["ppo"]) == len(samples)


def test_lengths_by_task_leave_conversations_out():
    lengths = page_samples(list(task_samples(POLICIES)), full_card())["lengths"]
    assert lengths["ifeval"]["ppo"] == [4] * 40
    assert lengths["mt"]["ppo"] == []


def test_thoughts_are_apart_from_answers():
    thinking = {"text": "<think>a</think>\n\nyes", "tokens": 9, "thought_tokens": 7, "thought_end": 18}
    sample = {"task": "prompts", "prompt": "p", "id": "1", "source": "s", "responses": {"sft": [thinking]}}
    (item,) = page_samples([sample], None)["items"]
    answer = item["answers"]["sft"][0]
    assert (answer["text"], answer["thought"], answer["thought_tokens"]) == ("yes", "<think>a</think>\n\n", 7)
    assert page_samples([sample], None)["lengths"] == {"prompts": {"sft": [2]}}
    plain = {**sample, "responses": {"sft": [{"text": "yes", "tokens": 2}]}}
    assert "thought" not in page_samples([plain], None)["items"][0]["answers"]["sft"][0]


def test_page_folds_thoughts_as_text():
    text = "<think><img src=x onerror=alert(1)></think>yes"
    response = {"text": text, "tokens": 9, "thought_tokens": 7, "thought_end": len(text) - 3}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    episode = response | {"messages": messages, "calls": [], "turns": 1, "stop": "finished"}
    sample = {"task": "prompts", "prompt": "p", "id": "1", "source": "s", "responses": {"sft": [response]}}
    page = page_samples([sample], None, {"ppo": [episode | {"prompt": "p", "response": text, "score": 1.0}]})
    html = load_template("section_samples.html.jinja").render(samples=page, samples_json=page_json(page))
    visible = html.split("<script")[0]
    fold = '<details class="thought"><summary class="small">thought</summary><div class="text" dir="auto">&lt;think&gt;'
    assert visible.count(fold) == 2
    assert "<img" not in html and "<think>" not in html
