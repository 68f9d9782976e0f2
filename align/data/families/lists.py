"""Families with a short reply of a fixed form: lists, objects, choices, numbers, copies, and counts of words.

A ``Task`` is an instruction, a correct reply, and the checks of any reply. Arithmetic and letter counts are the hard
families. Words and sentences come from ``bank.json``. Every change of that file changes the embedded dataset's digest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

BANK = json.loads(resources.files(__package__).joinpath("bank.json").read_text(encoding="utf-8"))
REQUESTS: dict[str, list[str]] = BANK["requests"]
"""Phrasings of the request of each family."""
CATEGORIES: dict[str, list[str]] = BANK["categories"]
"""Members of each class, singular and in lower case."""
SINGULAR: dict[str, str] = BANK["singular"]
WORDS: list[str] = BANK["words"]
"""Plain words for sorting, counting letters and repeating."""


class Topic(NamedTuple):
    """A topic to write about.

    ``stem`` must be in an on-topic reply; ``be`` is the verb that agrees; every fact is one sentence that begins with
    the topic and has no comma; ``taboo`` are likely words that at least two facts do not contain.
    """

    name: str
    stem: str
    be: str
    adjectives: list[str]
    facts: list[str]
    taboo: list[str]


TOPICS = [Topic(**topic) for topic in BANK["topics"]]

Constraint = dict[str, Any]
Guard = dict[str, Any]

TEXT_GUARD: Guard = {"min_words": 3, "max_words": 60, "max_share": 0.4}
"""Guard for prose; without ``max_words`` a reply that lists every topic would pass every guard."""

NUMBER = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


@dataclass(frozen=True)
class Task:
    """The contents of a row; ``reply`` satisfies every constraint and the guard."""

    prompt: str
    reply: str
    constraints: list[Constraint]
    guard: Guard


Family = Callable[[random.Random], Task]


def ifeval(name: str, **arguments: Any) -> Constraint:
    """Return a constraint that if-verifiable checks."""
    return {"kind": "ifeval", "id": name, "args": arguments}


SEPARATORS = {";": "semicolons", "|": "vertical bars (|)", "/": "slashes (/)", "+": "plus signs (+)"}


def _members(rng: random.Random, low: int, high: int) -> tuple[str, list[str]]:
    category = rng.choice(sorted(CATEGORIES))
    return category, rng.sample(CATEGORIES[category], rng.randint(low, high))


def _phrase(rng: random.Random, category: str) -> str:
    return rng.choice(("{0}", "{0}", "different {0}", "common {0}", "well-known {0}")).format(category)


def _guard(category: str, count: int) -> Guard:
    """Return a guard that requires half of the items, at least, to be members of the category."""
    hits = {"any_of": CATEGORIES[category], "min_hits": (count + 1) // 2}
    return {"min_words": min(count, 2), "max_words": 60, "max_share": 0.5, **hits}


def bullets(rng: random.Random) -> Task:
    """Ask for exactly two to five bullet points."""
    category, items = _members(rng, 2, 5)
    request = rng.choice(REQUESTS["bullets"])
    reply = "\n".join(f"- {item.capitalize()}" for item in items)
    constraint = ifeval("detectable_format:number_bullet_lists", num_bullets=len(items))
    prompt = request.format(NUMBER[len(items)], _phrase(rng, category))
    return Task(prompt, reply, [constraint], _guard(category, len(items)))


def numbered(rng: random.Random) -> Task:
    """Ask for a numbered list of two to five items."""
    category, items = _members(rng, 2, 5)
    request = rng.choice(REQUESTS["numbered"])
    reply = "\n".join(f"{n}. {item.capitalize()}" for n, item in enumerate(items, 1))
    constraint = {"kind": "numbered_list", "count": len(items)}
    prompt = request.format(NUMBER[len(items)], _phrase(rng, category))
    return Task(prompt, reply, [constraint], _guard(category, len(items)))


def separated(rng: random.Random) -> Task:
    """Ask for items on one line with an unusual separator."""
    category, items = _members(rng, 2, 4)
    separator = rng.choice(sorted(SEPARATORS))
    request = rng.choice(REQUESTS["separated"])
    # A semicolon follows its word directly, other separators have blanks around them.
    joint = "; " if separator == ";" else f" {separator} "
    constraint = {"kind": "separated", "separator": separator, "count": len(items)}
    prompt = request.format(NUMBER[len(items)], _phrase(rng, category), SEPARATORS[separator])
    return Task(prompt, joint.join(items), [constraint], _guard(category, len(items)))


def no_comma(rng: random.Random) -> Task:
    """Ask for a list in prose, where commas are natural, without commas."""
    category, items = _members(rng, 3, 4)
    request = rng.choice(REQUESTS["list_without_commas"])
    form = rng.choice(("I know {0}.", "I can think of {0}.", "My list has {0}.", "Some {1} are {0}."))
    reply = form.format(" and ".join(items), category)
    guard = _guard(category, len(items)) | {"min_words": 4}
    prompt = request.format(NUMBER[len(items)], _phrase(rng, category))
    return Task(prompt, reply, [ifeval("punctuation:no_comma"), {"kind": "sentence_count", "count": 1}], guard)


def json_object(rng: random.Random) -> Task:
    """Ask for a JSON object with two given keys."""
    category = rng.choice(sorted(SINGULAR))
    word = rng.choice(CATEGORIES[category])
    values = {
        "word": word,
        "type": SINGULAR[category],
        "language": "English",
        "rating": rng.randint(1, 5),
        "known": True,
    }
    keys = ["word", rng.choice(sorted(set(values) - {"word"}))]
    request = rng.choice(REQUESTS["json_object"])
    reply = json.dumps({key: values[key] for key in keys})
    guard = {"min_words": 3, "max_words": 40, "any_of": [word]}
    return Task(request.format(f"the word {word}", *keys), reply, [{"kind": "json_keys", "keys": keys}], guard)


def choose(rng: random.Random) -> Task:
    """Ask for one of two classes, in one word."""
    pair = list(rng.choice(BANK["choices"]))
    rng.shuffle(pair)
    right = rng.choice(pair)
    # "Orange" is a fruit and a color, so it would have two right answers.
    word = rng.choice([item for item in CATEGORIES[right] if item != "orange"])
    first, second = (SINGULAR[name] for name in pair)
    request = rng.choice(REQUESTS["choose"])
    answer = SINGULAR[right]
    constraint = {"kind": "one_of", "answer": answer}
    return Task(
        request.format(word, first, second), answer.capitalize(), [constraint], {"min_words": 1, "max_words": 60}
    )


def sort_words(rng: random.Random) -> Task:
    """Ask for two to four words in alphabetical order."""
    # Different first letters: the order is then one a small model can learn.
    letters = rng.sample(sorted({word[0] for word in WORDS}), rng.choice((2, 3, 3, 4)))
    items = [rng.choice([word for word in WORDS if word[0] == letter]) for letter in letters]
    if items == sorted(items):
        items.reverse()
    request = rng.choice(REQUESTS["sort_words"])
    reply = ", ".join(sorted(items))
    constraint = {"kind": "in_order", "items": sorted(items)}
    return Task(request.format(", ".join(items)), reply, [constraint], {"min_words": 2, "any_of": items, "min_hits": 2})


def arithmetic(rng: random.Random) -> Task:
    """Ask for a sum, difference or product of small numbers; the reply is only the number."""
    sign = rng.choice("++--*")
    if sign == "+":
        a = rng.randint(2, 30)
        b = rng.randint(2, 20)
        value = a + b
        spelled = f"{a} plus {b}"
    elif sign == "-":
        b = rng.randint(2, 20)
        a = b + rng.randint(1, 20)
        value = a - b
        spelled = f"{a} minus {b}"
    else:
        a = rng.randint(2, 9)
        b = rng.randint(2, 9)
        value = a * b
        spelled = f"{a} times {b}"
    request = rng.choice(REQUESTS["arithmetic"])
    prompt = request.format(f"{a} {sign} {b}", spelled)
    return Task(prompt, str(value), [{"kind": "number", "value": value}], {"min_words": 1, "max_words": 60})


def letter_count(rng: random.Random) -> Task:
    """Ask for the number of letters in a word."""
    word = rng.choice(WORDS)
    request = rng.choice(REQUESTS["letter_count"])
    constraint = {"kind": "number", "value": len(word)}
    return Task(request.format(word), str(len(word)), [constraint], {"min_words": 1, "max_words": 60})


def repeat(rng: random.Random) -> Task:
    """Ask for a word two to five times."""
    word = rng.choice(WORDS)
    count = rng.choice((2, 3, 4, 5))
    request = rng.choice(REQUESTS["repeat"])
    prompt = request.format(word, NUMBER[count])
    constraint = {"kind": "in_order", "items": [word] * count}
    return Task(prompt, " ".join([word] * count), [constraint], {"min_words": 1, "max_words": 60, "any_of": [word]})


def copy(rng: random.Random) -> Task:
    """Ask for words in another shape: in capitals, capitalized, or in brackets."""
    first, second = rng.sample(WORDS, 2)
    text = f"{first} {second}"
    shape = rng.choice(("upper", "title", "brackets"))
    asks = {
        "upper": ("Write {0} in capital letters.", "Turn {0} into capital letters. Reply with that only."),
        "title": ("Capitalize the first letter of each word: {0}.", "Write {0} with each word capitalized."),
        "brackets": ("Put {0} in square brackets.", "Write {0} between [ and ] and nothing else."),
    }
    reply = {"upper": text.upper(), "title": text.title(), "brackets": f"[{text}]"}[shape]
    constraints = [{"kind": "exact", "text": reply}]
    if shape == "brackets":
        constraints = [ifeval("detectable_content:number_placeholders", num_placeholders=1), *constraints]
    guard = {"min_words": 2, "max_words": 60, "any_of": [first, second], "min_hits": 2}
    return Task(rng.choice(asks[shape]).format(f'"{text}"'), reply, constraints, guard)


def sentence_count(rng: random.Random) -> Task:
    """Ask for exactly one to three sentences."""
    topic = rng.choice(TOPICS)
    count = rng.choice((1, 2, 3))
    request = rng.choice(REQUESTS["sentence_count"])
    reply = " ".join(rng.sample(topic.facts, count))
    unit = "sentence" if count == 1 else "sentences"
    prompt = request.format(NUMBER[count], unit, topic.name)
    return Task(prompt, reply, [{"kind": "sentence_count", "count": count}], TEXT_GUARD | {"any_of": [topic.stem]})


SHINES = {"the moon": "glows", "the sun": "shines", "the ocean": "roars"}


def exact_words(rng: random.Random) -> Task:
    """Ask for exactly three to six words: hard for a small model, easy to check."""
    topic = rng.choice(TOPICS)
    count = rng.choice((3, 4, 5, 6))
    first, second = rng.sample(topic.adjectives, 2)
    bare = topic.name.removeprefix("the ")
    subject = topic.name.capitalize()
    be = topic.be
    if bare != topic.name:  # "the" is a word of the reply too
        forms = {
            3: f"{subject} {SHINES[topic.name]}.",
            4: f"{subject} {be} {first}.",
            5: f"{subject} {be} very {first}.",
        }
        forms[6] = f"{subject} {be} {first} and {second}."
    else:
        forms = {
            3: f"{subject} {be} {first}.",
            4: f"{subject} {be} very {first}.",
            5: f"{subject} {be} {first} and {second}.",
        }
        forms[6] = f"I think {bare} {be} very {first}."
        if topic.be == "is" and rng.random() < 0.5:
            forms[4] = f"I love my {bare}."
    request = rng.choice(REQUESTS["exact_words"])
    constraint = {"kind": "word_count", "low": count, "high": count}
    guard = {"min_words": min(3, count), "max_words": 60, "any_of": [topic.stem]}
    return Task(request.format(topic.name, NUMBER[count]), forms[count], [constraint], guard)


def few_words(rng: random.Random) -> Task:
    """Ask for at most five to eight words; the facts are that short."""
    topic = rng.choice(TOPICS)
    limit = rng.choice((5, 6, 7, 8))
    short = [fact for fact in topic.facts if len(fact.split()) <= limit]
    reply = rng.choice(short) if short else f"{topic.name.capitalize()} {topic.be} {rng.choice(topic.adjectives)}."
    request = rng.choice(REQUESTS["few_words"])
    constraint = ifeval("length_constraints:number_words", num_words=limit + 1, relation="less than")
    guard = TEXT_GUARD | {"any_of": [topic.stem]}
    return Task(request.format(topic.name, limit, limit + 1), reply, [constraint], guard)


def keyword_twice(rng: random.Random) -> Task:
    """Ask for the topic word at least two to four times."""
    topic = rng.choice(TOPICS)
    count = rng.choice((2, 2, 3, 4))
    word = topic.name.removeprefix("the ")
    request = rng.choice(REQUESTS["keyword_twice"])
    reply = " ".join(rng.sample(topic.facts, count))
    constraint = ifeval("keywords:frequency", keyword=word, frequency=count, relation="at least")
    guard = TEXT_GUARD | {"min_words": 5, "any_of": [topic.stem]}
    return Task(request.format(topic.name, word, NUMBER[count]), reply, [constraint], guard)
