"""Families whose reply is a list, an object, or a choice: bullets, numbers, separators, JSON, sorting, choosing."""

from __future__ import annotations

import json
import random

from align.data.families.bank import CATEGORIES, WORDS
from align.data.families.task import NUMBER, Guard, Task, ifeval

SINGULAR = {
    "fruits": "fruit",
    "vegetables": "vegetable",
    "animals": "animal",
    "birds": "bird",
    "colors": "color",
    "sports": "sport",
    "jobs": "job",
    "vehicles": "vehicle",
    "tools": "tool",
    "drinks": "drink",
    "clothes": "garment",
    "instruments": "instrument",
    "insects": "insect",
    "furniture": "furniture",
    "metals": "metal",
    "flowers": "flower",
}
CHOICES = (
    ("fruits", "animals"),
    ("animals", "tools"),
    ("colors", "sports"),
    ("jobs", "vehicles"),
    ("vegetables", "metals"),
    ("drinks", "instruments"),
    ("insects", "furniture"),
    ("birds", "vehicles"),
    ("sports", "jobs"),
    ("metals", "birds"),
    ("instruments", "animals"),
    ("fruits", "jobs"),
    ("drinks", "tools"),
    ("vehicles", "insects"),
)
SEPARATORS = {";": "semicolons", "|": "vertical bars (|)", "/": "slashes (/)", "+": "plus signs (+)"}


def _members(rng: random.Random, low: int, high: int) -> tuple[str, list[str]]:
    category = rng.choice(sorted(CATEGORIES))
    return category, rng.sample(CATEGORIES[category], rng.randint(low, high))


def _phrase(rng: random.Random, category: str) -> str:
    return rng.choice(("{0}", "{0}", "different {0}", "common {0}", "well-known {0}")).format(category)


def _guard(category: str, count: int) -> Guard:
    """Return a guard that requires half of the items, at least, to be members of the category."""
    stems = list(CATEGORIES[category])
    return {
        "min_words": min(count, 2),
        "max_words": 60,
        "max_share": 0.5,
        "any_of": stems,
        "min_hits": (count + 1) // 2,
    }


def bullets(rng: random.Random) -> Task:
    """Ask for exactly two to five bullet points."""
    category, items = _members(rng, 2, 5)
    ask = rng.choice(
        (
            "List {0} {1} as bullet points.",
            'Name {0} {1}. Put each on its own line that starts with "- ".',
            "Give me a bullet list of exactly {0} {1}.",
            "Write {0} bullet points that name {1}.",
        )
    )
    reply = "\n".join(f"- {item.capitalize()}" for item in items)
    constraint = ifeval("detectable_format:number_bullet_lists", num_bullets=len(items))
    return Task(
        ask.format(NUMBER[len(items)], _phrase(rng, category)), reply, [constraint], _guard(category, len(items))
    )


def numbered(rng: random.Random) -> Task:
    """Ask for a numbered list of two to five items."""
    category, items = _members(rng, 2, 5)
    ask = rng.choice(
        (
            "Make a numbered list of {0} {1}.",
            "Name {0} {1}, numbered 1., 2. and so on.",
            "Number {0} {1}, one per line, with no other text.",
        )
    )
    reply = "\n".join(f"{n}. {item.capitalize()}" for n, item in enumerate(items, 1))
    constraint = {"kind": "numbered_list", "count": len(items)}
    return Task(
        ask.format(NUMBER[len(items)], _phrase(rng, category)), reply, [constraint], _guard(category, len(items))
    )


def separated(rng: random.Random) -> Task:
    """Ask for items on one line with an unusual separator."""
    category, items = _members(rng, 2, 4)
    separator = rng.choice(sorted(SEPARATORS))
    ask = rng.choice(
        (
            "Name {0} {1} on one line, separated by {2}.",
            "List {0} {1} with {2} between them, on a single line.",
            "Write {0} {1} in one line. Separate them with {2}.",
        )
    )
    # A semicolon follows its word directly, other separators have blanks around them.
    joint = "; " if separator == ";" else f" {separator} "
    constraint = {"kind": "separated", "separator": separator, "count": len(items)}
    prompt = ask.format(NUMBER[len(items)], _phrase(rng, category), SEPARATORS[separator])
    return Task(prompt, joint.join(items), [constraint], _guard(category, len(items)))


def no_comma(rng: random.Random) -> Task:
    """Ask for a list in prose, where commas are natural, without commas."""
    category, items = _members(rng, 3, 4)
    ask = rng.choice(
        (
            "Name {0} {1} in one sentence without using any commas.",
            "Mention {0} {1} in a sentence. Do not use commas.",
            "Write a sentence with {0} {1} and no commas.",
            "In a sentence that has no commas, name {0} {1}.",
        )
    )
    form = rng.choice(("I know {0}.", "I can think of {0}.", "My list has {0}.", "Some {1} are {0}."))
    reply = form.format(" and ".join(items), category)
    guard = _guard(category, len(items)) | {"min_words": 4}
    prompt = ask.format(NUMBER[len(items)], _phrase(rng, category))
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
    ask = rng.choice(
        (
            'Describe {0} as a JSON object with the keys "{1}" and "{2}".',
            'Reply in JSON with "{1}" and "{2}" for {0}.',
            'Give only a JSON object for {0} that has "{1}" and "{2}".',
        )
    )
    reply = json.dumps({key: values[key] for key in keys})
    guard = {"min_words": 3, "max_words": 40, "any_of": [word]}
    return Task(ask.format(f"the word {word}", *keys), reply, [{"kind": "json_keys", "keys": keys}], guard)


def choose(rng: random.Random) -> Task:
    """Ask for one of two classes, in one word."""
    pair = list(rng.choice(CHOICES))
    rng.shuffle(pair)
    right = rng.choice(pair)
    word = rng.choice([item for item in CATEGORIES[right] if item != "orange"])
    first, second = (SINGULAR[name] for name in pair)
    ask = rng.choice(
        (
            'Is the word "{0}" closer to {1} or {2}? Answer with one word.',
            'Which fits "{0}": {1} or {2}? Reply with one word only.',
            'Choose {1} or {2} for "{0}". Give just the word.',
        )
    )
    answer = SINGULAR[right]
    constraint = {"kind": "one_of", "answer": answer}
    return Task(ask.format(word, first, second), answer.capitalize(), [constraint], {"min_words": 1, "max_words": 60})


def sort_words(rng: random.Random) -> Task:
    """Ask for two to four words in alphabetical order."""
    # Different first letters: the order is then one a small model can learn.
    letters = rng.sample(sorted({word[0] for word in WORDS}), rng.choice((2, 3, 3, 4)))
    items = [rng.choice([word for word in WORDS if word[0] == letter]) for letter in letters]
    if items == sorted(items):
        items.reverse()
    ask = rng.choice(
        (
            "Sort these words alphabetically: {0}.",
            "Put these words in alphabetical order: {0}. Reply with the words only.",
            "Alphabetize: {0}.",
        )
    )
    reply = ", ".join(sorted(items))
    constraint = {"kind": "in_order", "items": sorted(items)}
    return Task(ask.format(", ".join(items)), reply, [constraint], {"min_words": 2, "any_of": items, "min_hits": 2})
