"""Families about numbers and copying: arithmetic, letters in a word, repetition. The first two are the hard ones."""

from __future__ import annotations

import random

from align.data.families.bank import WORDS
from align.data.families.task import NUMBER, Task, ifeval


def arithmetic(rng: random.Random) -> Task:
    """Ask for a sum, difference or product of small numbers; the reply is the number alone."""
    sign = rng.choice("++--*")
    if sign == "+":
        a, b = rng.randint(2, 30), rng.randint(2, 20)
        value, spelled = a + b, f"{a} plus {b}"
    elif sign == "-":
        b = rng.randint(2, 20)
        a = b + rng.randint(1, 20)
        value, spelled = a - b, f"{a} minus {b}"
    else:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        value, spelled = a * b, f"{a} times {b}"
    ask = rng.choice(
        (
            "What is {0}? Reply with the number only.",
            "Calculate {1}. Give just the number.",
            "Work out {1} and answer with a number only.",
            "{0} = ? Answer with the number alone.",
        )
    )
    prompt = ask.format(f"{a} {sign} {b}", spelled)
    return Task(prompt, str(value), [{"kind": "number", "value": value}], {"min_words": 1, "max_words": 60})


def letter_count(rng: random.Random) -> Task:
    """Ask for the number of letters in a word."""
    word = rng.choice(WORDS)
    ask = rng.choice(
        (
            'How many letters are in the word "{0}"? Reply with the number only.',
            'Count the letters in "{0}". Give just the number.',
            'How long is the word "{0}"? Give the number of letters only.',
            'What is the length of the word "{0}"? Answer with a number only.',
        )
    )
    constraint = {"kind": "number", "value": len(word)}
    return Task(ask.format(word), str(len(word)), [constraint], {"min_words": 1, "max_words": 60})


def repeat(rng: random.Random) -> Task:
    """Ask for a word two to five times."""
    word, count = rng.choice(WORDS), rng.choice((2, 3, 4, 5))
    ask = rng.choice(
        (
            'Say the word "{0}" {1} times.',
            'Repeat "{0}" exactly {1} times and write nothing else.',
            'Write "{0}" {1} times, with spaces between.',
        )
    )
    prompt = ask.format(word, NUMBER[count])
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
