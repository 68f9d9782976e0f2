"""The page: hostile text stays text, nothing is fetched, partial and failed runs have one too."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from align.environments.journal import CallResult
from align.environments.results import Scores
from align.evaluation.comparisons import Resampling
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, build
from align.report.run.run_report import write_report
from align.report.scorecard.samples import page_samples
from align.store.artifacts import Kind
from tests.support.report.example_card import SETTINGS, reward_report
from tests.support.report.example_episodes import episode_line, play
from tests.support.report.example_run import HOSTILE
from tests.support.stored_rollouts import write_lines


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text += data


@pytest.fixture(scope="module")
def page(run, tmp_path_factory) -> Page:
    artifacts, card = run
    folder = tmp_path_factory.mktemp("page")
    return Page(write_report(artifacts, card, folder / "report.html").read_text(encoding="utf-8"))


def test_hostile_text_is_text(page):
    assert [tag for tag, _ in page.tags].count("script") == 3  # the data of samples and curves, and our own
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "b>")]
    handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert handlers == []
    assert "<script>document.title" in page.text  # shown
    assert "\\x1b[31m" in page.text
    assert "\\u202egnp.exe" in page.text
    assert "{{ 7*7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page.text)


def test_nothing_is_fetched(page):
    links = [a[n] for _, a in page.tags for n in ("href", "src", "xlink:href", "action", "data") if a.get(n)]
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_ids_are_unique_and_references_resolve(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for value in attributes.values():
            for target in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert target in ids


def test_the_summary_comes_first_and_says_what_helped(page):
    assert page.text.index("sft raised the gold score over model") < page.text.index("Each box")
    assert "ppo: no clear change in gold score over sft" in page.text
    assert "orders 0.800 of 10 held-out pairs" in page.text
    for words in ("align run pipelines/quickstart.yaml", "learning_rate: 0.0005", "torch 2.13.0", "nested.deep"):
        assert words in page.text


def test_figures_are_drawn(page):
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    for words in ("gold against KL", "Reward-model score against KL", "by source", "lengths", "loss over steps"):
        assert any(words in label for label in labels), words


def test_the_page_of_a_failed_run(run, tmp_path):
    artifacts, _ = run
    log = tmp_path / "log.txt"
    log.write_text("Traceback <b>\x1b[0m\n")
    failed = {"stage": "dpo", "message": "RuntimeError: <i>no</i>", "log": str(log), "pending": ["evaluate"]}
    text = write_report(artifacts[:3], None, tmp_path / "r.html", failed).read_text(encoding="utf-8")
    page = Page(text)
    assert "Stage dpo failed" in page.text
    assert "RuntimeError: <i>no</i>" in page.text
    assert "Traceback <b>\\x1b[0m" in page.text
    assert "cannot say which stage helped" in page.text


def test_the_page_of_nothing(tmp_path):
    assert "0 stages" in write_report([], None, tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_scorecard_among_the_artifacts_is_found(run, tmp_path):
    text = write_report(run[0], None, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "sft raised the gold score" in text


def test_samples_are_sorted_by_change_and_bounded(run, monkeypatch):
    artifacts, card = run
    lines = (artifacts[-1].path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    shown = page_samples(samples, card)
    assert shown["items"][0]["id"] == "0"  # ppo gained 1.0 there
    assert shown["items"][0]["change"] == {"model": 0.0, "ppo": 1.0}
    monkeypatch.setattr("align.report.scorecard.samples.MAX_BYTES", 2_000)
    bounded = page_samples(samples, card)
    assert 0 < len(bounded["items"]) < len(samples)
    assert bounded["left_out"] == len(samples) - len(bounded["items"])


def test_an_evaluation_of_reward_models_alone_has_a_page(tmp_path):
    measurements = Measurements([SystemInfo("sft", "sft", "checkpoint", "key")], "sft", None, values={"sft": {}})
    measurements.reward_models = [reward_report(sections=True)]
    card = build(measurements, Resampling(100, 0), {**SETTINGS, "prompts": 0})
    text = Page(write_report([], card, tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "The reward model reward orders " in text
    assert "Chat Hard" in text
    assert "not measured" not in text


def test_a_hostile_episode_is_text_of_bounded_size(make_artifact, tmp_path):
    ppo = make_artifact("ppo", Kind.POLICY, curves={"turns": [1.0, 2.0], "score_turn_1": [0.0, 1.0]})
    prompt = [{"role": "user", "content": HOSTILE}]
    whole = HOSTILE.rstrip("\ud800")  # half a character in a call makes it malformed
    call = '<tool_call>{"name": "add", "arguments": ' + json.dumps({whole: whole}) + "}</tool_call>"
    result, malformed = HOSTILE + "x" * 1_000_000, "<tool_call>{" + HOSTILE
    script = [HOSTILE + call, CallResult(result, "raised"), malformed, "end", Scores(0.5, {}, [0.0, 0.0, 0.5])]
    line = episode_line(play(prompt, script), prompt)
    line |= {"by_token": line["by_token"][:9], "sampled": line["sampled"][:9], "failure": HOSTILE}
    write_lines(ppo.path / "rollouts", [line])
    text = write_report([ppo], None, tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 200_000
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800]", text)
    # Without a script the conversation is there to be read, too.
    for words in ("turn 1 · score 0.000", "turn 3 · score 0.500", "✗ the tool raised", "more characters)", "3 turns"):
        assert words in page.text, words
    assert page.text.count("<script>document.title") >= 4
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes]
    assert [label.split(" over steps")[0] for label in labels if " over steps" in label] == ["score_turn_1", "turns"]
