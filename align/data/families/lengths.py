"""Families about amounts: sentences, words, and mentions of the topic."""

from __future__ import annotations

import random

from align.data.families.bank import TOPICS
from align.data.families.task import NUMBER, TEXT_GUARD, Task, ifeval


def sentence_count(rng: random.Random) -> Task:
    """Ask for exactly one to three sentences."""
    topic, count = rng.choice(TOPICS), rng.choice((1, 2, 3))
    ask = rng.choice(
        (
            "Write exactly {0} {1} about {2}.",
            "Describe {2} in exactly {0} {1}.",
            "Tell me about {2} in {0} {1}.",
            "I want exactly {0} {1} on {2}.",
        )
    )
    reply = " ".join(rng.sample(topic.facts, count))
    unit = "sentence" if count == 1 else "sentences"
    prompt = ask.format(NUMBER[count], unit, topic.name)
    return Task(prompt, reply, [{"kind": "sentence_count", "count": count}], TEXT_GUARD | {"any_of": [topic.stem]})


SHINES = {"the moon": "glows", "the sun": "shines", "the ocean": "roars"}


def exact_words(rng: random.Random) -> Task:
    """Ask for exactly three to six words: hard for a small model, easy to check."""
    topic, count = rng.choice(TOPICS), rng.choice((3, 4, 5, 6))
    first, second = rng.sample(topic.adjectives, 2)
    bare = topic.name.removeprefix("the ")
    subject, be = topic.name.capitalize(), topic.be
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
    ask = rng.choice(
        (
            "Describe {0} in exactly {1} words.",
            "Use exactly {1} words to describe {0}.",
            "Write exactly {1} words about {0}.",
        )
    )
    constraint = {"kind": "word_count", "low": count, "high": count}
    guard = {"min_words": min(3, count), "max_words": 60, "any_of": [topic.stem]}
    return Task(ask.format(topic.name, NUMBER[count]), forms[count], [constraint], guard)


def few_words(rng: random.Random) -> Task:
    """Ask for at most five to eight words; the facts are that short."""
    topic = rng.choice(TOPICS)
    limit = rng.choice((5, 6, 7, 8))
    short = [fact for fact in topic.facts if len(fact.split()) <= limit]
    reply = rng.choice(short) if short else f"{topic.name.capitalize()} {topic.be} {rng.choice(topic.adjectives)}."
    ask = rng.choice(
        (
            "Describe {0} in at most {1} words.",
            "Tell me about {0} in fewer than {2} words.",
            "Say something about {0}. Use no more than {1} words.",
        )
    )
    constraint = ifeval("length_constraints:number_words", num_words=limit + 1, relation="less than")
    guard = TEXT_GUARD | {"any_of": [topic.stem]}
    return Task(ask.format(topic.name, limit, limit + 1), reply, [constraint], guard)


def keyword_twice(rng: random.Random) -> Task:
    """Ask for the topic word at least two to four times."""
    topic, count = rng.choice(TOPICS), rng.choice((2, 2, 3, 4))
    word = topic.name.removeprefix("the ")
    ask = rng.choice(
        (
            'Talk about {0}. Use the word "{1}" at least {2} times.',
            'Write about {0} and say "{1}" {2} times.',
            'Tell me about {0} with the word "{1}" in it at least {2} times.',
            'Use "{1}" {2} or more times in a text about {0}.',
        )
    )
    reply = " ".join(rng.sample(topic.facts, count))
    constraint = ifeval("keywords:frequency", keyword=word, frequency=count, relation="at least")
    guard = TEXT_GUARD | {"min_words": 5, "any_of": [topic.stem]}
    return Task(ask.format(topic.name, word, NUMBER[count]), reply, [constraint], guard)
