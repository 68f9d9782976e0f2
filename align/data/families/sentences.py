"""Families of prose about a topic: each asks for a sentence or two and adds one or two twists.

A twist states how the reply must look, changes a plain reply accordingly, and names the constraint.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from align.data.families.bank import TOPICS, Topic
from align.data.families.lists import TEXT_GUARD, Constraint, Family, Task, ifeval

OPENS = (
    "Write a sentence about {0}.",
    "Tell me something about {0}.",
    "Say one thing about {0}.",
    "Share a short fact about {0}.",
    "What do you know about {0}?",
    "Write something short about {0}.",
    "Give me a sentence on {0}.",
)
STARTS = ("Honestly", "In my view", "To be fair", "As we know", "Of course", "Well", "Fun fact:", "Dear friend")
ENDS = ("That is all.", "Have a nice day.", "Hope this helps.", "The end.", "Thank you.", "Is that clear?")
KEYWORDS = {
    "friend": "and my friend agrees",
    "morning": "even in the morning",
    "because": "because that is their nature",
    "window": "as seen from my window",
    "often": "more often than not",
    "summer": "most of all in summer",
    "grandmother": "as my grandmother says",
    "together": "when we are together",
    "perhaps": "or perhaps not",
    "village": "in our village",
}


@dataclass(frozen=True)
class Twist:
    """An additional request. ``apply`` makes a plain reply satisfy ``constraint``; lower ranks are applied first."""

    ask: str
    constraint: Constraint
    apply: Callable[[str], str]
    rank: int = 1
    facts: tuple[str, ...] = ()
    forbids: str = ""


MakeTwist = Callable[[random.Random, Topic], Twist]


def _lowercase(rng: random.Random, topic: Topic) -> Twist:
    ask = rng.choice(("Use only lowercase letters.", "Write in all lowercase.", "Do not use any capital letters."))
    return Twist(ask, {"kind": "lowercase"}, str.lower, rank=3)


def _uppercase(rng: random.Random, topic: Topic) -> Twist:
    ask = rng.choice(("Use only capital letters.", "Write in all caps.", "Your whole reply must be in uppercase."))
    return Twist(ask, {"kind": "uppercase"}, str.upper, rank=3)


def _starts(rng: random.Random, topic: Topic) -> Twist:
    phrase = rng.choice(STARTS)
    ask = rng.choice(('Start with "{0}".', 'Begin your reply with "{0}".', 'The first words must be "{0}".'))
    joint = " " if phrase.endswith(":") else ", "
    return Twist(
        ask.format(phrase),
        {"kind": "starts_with", "text": phrase},
        lambda reply: f"{phrase}{joint}{reply[0].lower()}{reply[1:]}",
    )


def _ends(rng: random.Random, topic: Topic) -> Twist:
    phrase = rng.choice(ENDS)
    ask = rng.choice(('End with "{0}"', 'Finish your reply with "{0}"', 'The last words must be "{0}"'))
    constraint = ifeval("startend:end_checker", end_phrase=phrase)
    return Twist(ask.format(phrase), constraint, lambda reply: f"{reply} {phrase}", rank=2)


def _keyword(rng: random.Random, topic: Topic) -> Twist:
    word = rng.choice(sorted(KEYWORDS))
    ask = rng.choice(('Include the word "{0}".', 'Use the word "{0}".', 'Your reply must contain "{0}".'))
    return Twist(
        ask.format(word),
        ifeval("keywords:existence", keywords=[word]),
        lambda reply: f"{reply.rstrip('.')} {KEYWORDS[word]}.",
        rank=0,
    )


def _forbidden(rng: random.Random, topic: Topic) -> Twist:
    word = rng.choice(topic.taboo)
    ask = rng.choice(('Do not use the word "{0}".', 'Avoid the word "{0}".', 'Never say "{0}".'))
    facts = tuple(fact for fact in topic.facts if word not in fact.lower())
    constraint = ifeval("keywords:forbidden_words", forbidden_words=[word])
    return Twist(ask.format(word), constraint, lambda reply: reply, facts=facts, forbids=word)


def _quotes(rng: random.Random, topic: Topic) -> Twist:
    ask = rng.choice(
        (
            "Wrap your whole reply in double quotes.",
            "Put double quotation marks around your reply.",
            "Your reply must be inside double quotes.",
        )
    )
    return Twist(ask, ifeval("startend:quotation"), lambda reply: f'"{reply}"', rank=5)


def _postscript(rng: random.Random, topic: Topic) -> Twist:
    notes = ("I like them a lot.", "Ask me for more.", "This is my favorite topic.", "Come and see.")
    note = rng.choice(notes[1:] if topic.be == "is" else notes)
    ask = rng.choice(("Add a note that starts with P.S. at the end.", "End with a postscript that starts with P.S."))
    constraint = ifeval("detectable_content:postscript", postscript_marker="P.S.")
    return Twist(ask, constraint, lambda reply: f"{reply}\nP.S. {note}", rank=2)


def _no_comma(rng: random.Random, topic: Topic) -> Twist:
    ask = rng.choice(("Do not use any commas.", "Use no commas.", "Avoid commas."))
    return Twist(ask, ifeval("punctuation:no_comma"), lambda reply: reply)


def _highlight(rng: random.Random, topic: Topic) -> Twist:
    ask = rng.choice(("Put one word in *asterisks*.", "Highlight a word with *asterisks*, like *this*."))
    constraint = ifeval("detectable_format:number_highlighted_sections", num_highlights=1)

    def apply(reply: str) -> str:
        head, _, last = reply.partition(".")[0].rpartition(" ")
        return f"{head} *{last}*{reply[len(head) + 1 + len(last) :]}"

    return Twist(ask, constraint, apply, rank=0)


TWISTS: dict[str, MakeTwist] = {
    "lowercase": _lowercase,
    "uppercase": _uppercase,
    "starts": _starts,
    "ends": _ends,
    "keyword": _keyword,
    "forbidden": _forbidden,
    "quotes": _quotes,
    "postscript": _postscript,
    "highlight": _highlight,
}

# Both twists of a pair can be satisfied at once, by applying them in the order of their ranks.
COMBINATIONS = (
    ("lowercase", "starts"),
    ("lowercase", "ends"),
    ("lowercase", "keyword"),
    ("lowercase", "quotes"),
    ("uppercase", "starts"),
    ("uppercase", "keyword"),
    ("uppercase", "quotes"),
    ("uppercase", "ends"),
    ("starts", "ends"),
    ("starts", "keyword"),
    ("ends", "forbidden"),
    ("ends", "quotes"),
    ("keyword", "quotes"),
    ("forbidden", "starts"),
    ("no_comma", "keyword"),
    ("no_comma", "lowercase"),
    ("no_comma", "uppercase"),
    ("no_comma", "ends"),
    ("keyword", "postscript"),
)


def twisted(names: tuple[str, ...]) -> Family:
    """Return the family that asks for these twists at once."""

    def make(rng: random.Random) -> Task:
        return _task(rng, names)

    return make


def combined(rng: random.Random) -> Task:
    """Write a task with two twists, from the compatible pairs."""
    return _task(rng, rng.choice(COMBINATIONS))


def _are_contradictory(twists: list[Twist]) -> bool:
    """Return True if a twist forbids a word that another asks for: "Dear friend" without "friend"."""
    for first, second in itertools.permutations(twists, 2):
        if first.forbids and re.search(rf"\b{first.forbids}\b", second.ask.lower()):
            return True
    return False


def _task(rng: random.Random, names: tuple[str, ...]) -> Task:
    topic = rng.choice(TOPICS)
    makers = TWISTS | {"no_comma": _no_comma}
    twists = [makers[name](rng, topic) for name in names]
    if _are_contradictory(twists):
        # Drawn again from the same stream, so the dataset stays the same for a seed.
        return _task(rng, names)
    facts = next((twist.facts for twist in twists if twist.facts), topic.facts)
    reply = rng.choice(facts)
    # Lower ranks first: words are added before case changes, quotation marks go around everything.
    for twist in sorted(twists, key=lambda twist: twist.rank):
        reply = twist.apply(reply)
    prompt = " ".join([rng.choice(OPENS).format(topic.name), *(twist.ask for twist in twists)])
    return Task(prompt, reply, [twist.constraint for twist in twists], TEXT_GUARD | {"any_of": [topic.stem]})


QUESTIONS = {
    "What": ("What do you like most about {0}?", "What makes {0} {2}?", "What do you know about {0}?"),
    "Why": ("Why {1} {0} so {2}?", "Why do people care about {0}?"),
    "When": ("When did you first learn about {0}?", "When do people talk about {0}?"),
    "How": ("How would you describe {0}?", "How {2} {1} {0}?"),
    "Do": ("Do you know much about {0}?", "Do you think about {0} a lot?"),
}


def question(rng: random.Random) -> Task:
    """Ask one question, with or without a given first word."""
    topic, first = rng.choice(TOPICS), rng.choice(sorted(QUESTIONS))
    ask = rng.choice(("Ask me a question about {0}", "Write one question about {0}", "Reply with a question about {0}"))
    reply = rng.choice(QUESTIONS[first]).format(topic.name, topic.be, rng.choice(topic.adjectives))
    constraints: list[Constraint] = [{"kind": "question"}]
    prompt = ask.format(topic.name)
    if rng.random() < 0.7:
        prompt += f' that starts with "{first}"'
        constraints.append({"kind": "starts_with", "text": first})
    return Task(f"{prompt}.", reply, constraints, TEXT_GUARD | {"any_of": [topic.stem]})


def title(rng: random.Random) -> Task:
    """Ask for a title in double angle brackets."""
    topic = rng.choice(TOPICS)
    ask = rng.choice(
        (
            "Write a title for a {1} about {0}, in double angle brackets like <<title>>.",
            "Give me a title for a {1} about {0}. Wrap it in << and >>.",
            "Make up a {1} title about {0}, written as <<title>>.",
        )
    )
    form = rng.choice(("A Day with {0}", "The Secret of {0}", "All about {0}", "My Life with {0}", "A Song for {0}"))
    reply = f"<<{form.format(topic.name.title())}>>"
    guard = {"min_words": 2, "max_words": 30, "any_of": [topic.stem]}
    work = rng.choice(("story", "book", "song", "poem", "movie", "game", "lesson"))
    return Task(ask.format(topic.name, work), reply, [ifeval("detectable_format:title")], guard)
