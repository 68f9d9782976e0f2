"""The embedded dataset: short instructions whose answers a program can check, with correct replies.

Deterministic: ``generate(size, seed)`` gives the same rows on every machine, only from the standard library's Mersenne
Twister. Each family is one kind of constraint; they take turns, so all have the same share. The families here write
prose about a topic: each asks for a sentence or two and adds one or two twists. A twist states how the reply must look,
changes a plain reply accordingly, and names the constraint. The other families are in ``lists``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from align.config.validation import suggest
from align.data.families import lists
from align.data.families.lists import BANK, REQUESTS, TEXT_GUARD, TOPICS, Constraint, Family, Task, Topic, ifeval
from align.data.rows import Row, assistant, normalized, user
from align.errors import UserError


@dataclass(frozen=True)
class Twist:
    """An additional request. ``apply`` makes a plain reply satisfy ``constraint``; lower ranks are applied first."""

    request: str
    constraint: Constraint
    apply: Callable[[str], str]
    rank: int = 1
    facts: Sequence[str] = ()
    forbids: str = ""


MakeTwist = Callable[[random.Random, Topic], Twist]


def _lowercase(rng: random.Random, topic: Topic) -> Twist:
    return Twist(rng.choice(REQUESTS["lowercase"]), {"kind": "lowercase"}, str.lower, rank=3)


def _uppercase(rng: random.Random, topic: Topic) -> Twist:
    return Twist(rng.choice(REQUESTS["uppercase"]), {"kind": "uppercase"}, str.upper, rank=3)


def _starts(rng: random.Random, topic: Topic) -> Twist:
    phrase = rng.choice(BANK["starts"])
    request = rng.choice(REQUESTS["starts"])
    joint = " " if phrase.endswith(":") else ", "
    return Twist(
        request.format(phrase),
        {"kind": "starts_with", "text": phrase},
        lambda reply: f"{phrase}{joint}{reply[0].lower()}{reply[1:]}",
    )


def _ends(rng: random.Random, topic: Topic) -> Twist:
    phrase = rng.choice(BANK["ends"])
    request = rng.choice(REQUESTS["ends"])
    constraint = ifeval("startend:end_checker", end_phrase=phrase)
    return Twist(request.format(phrase), constraint, lambda reply: f"{reply} {phrase}", rank=2)


def _keyword(rng: random.Random, topic: Topic) -> Twist:
    word = rng.choice(sorted(BANK["keywords"]))
    request = rng.choice(REQUESTS["keyword"])
    return Twist(
        request.format(word),
        ifeval("keywords:existence", keywords=[word]),
        lambda reply: f"{reply.rstrip('.')} {BANK['keywords'][word]}.",
        rank=0,
    )


def _forbidden(rng: random.Random, topic: Topic) -> Twist:
    word = rng.choice(topic.taboo)
    request = rng.choice(REQUESTS["forbidden"])
    facts = [fact for fact in topic.facts if word not in fact.lower()]
    constraint = ifeval("keywords:forbidden_words", forbidden_words=[word])
    return Twist(request.format(word), constraint, lambda reply: reply, facts=facts, forbids=word)


def _quotes(rng: random.Random, topic: Topic) -> Twist:
    request = rng.choice(REQUESTS["quotes"])
    return Twist(request, ifeval("startend:quotation"), lambda reply: f'"{reply}"', rank=5)


def _postscript(rng: random.Random, topic: Topic) -> Twist:
    notes = ("I like them a lot.", "Ask me for more.", "This is my favorite topic.", "Come and see.")
    note = rng.choice(notes[1:] if topic.be == "is" else notes)
    request = rng.choice(REQUESTS["postscript"])
    constraint = ifeval("detectable_content:postscript", postscript_marker="P.S.")
    return Twist(request, constraint, lambda reply: f"{reply}\nP.S. {note}", rank=2)


def _no_comma(rng: random.Random, topic: Topic) -> Twist:
    request = rng.choice(REQUESTS["no_comma"])
    return Twist(request, ifeval("punctuation:no_comma"), lambda reply: reply)


def _highlight(rng: random.Random, topic: Topic) -> Twist:
    request = rng.choice(REQUESTS["highlight"])
    constraint = ifeval("detectable_format:number_highlighted_sections", num_highlights=1)

    def apply(reply: str) -> str:
        head, _, last = reply.partition(".")[0].rpartition(" ")
        return f"{head} *{last}*{reply[len(head) + 1 + len(last) :]}"

    return Twist(request, constraint, apply, rank=0)


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


def twisted(names: tuple[str, ...]) -> Family:
    """Return the family that asks for these twists at once."""

    def make(rng: random.Random) -> Task:
        return _task(rng, names)

    return make


def combined(rng: random.Random) -> Task:
    """Write a task with two twists that can be satisfied at once, by applying them in the order of their ranks."""
    return _task(rng, rng.choice(BANK["pairs_of_twists"]))


def _are_contradictory(twists: list[Twist]) -> bool:
    """Return True if a twist forbids a word that another asks for: "Dear friend" without "friend"."""
    for first, second in itertools.permutations(twists, 2):
        if first.forbids and re.search(rf"\b{first.forbids}\b", second.request.lower()):
            return True
    return False


def _task(rng: random.Random, names: tuple[str, ...]) -> Task:
    topic = rng.choice(TOPICS)
    makers = TWISTS | {"no_comma": _no_comma}
    twists = [makers[name](rng, topic) for name in names]
    if _are_contradictory(twists):
        # Draw again from the same stream, so the dataset stays the same for a seed.
        return _task(rng, names)
    facts = next((twist.facts for twist in twists if twist.facts), topic.facts)
    reply = rng.choice(facts)
    # Lower ranks first: words are added before case changes, quotation marks go around everything.
    for twist in sorted(twists, key=lambda twist: twist.rank):
        reply = twist.apply(reply)
    prompt = " ".join([rng.choice(BANK["opens"]).format(topic.name), *(twist.request for twist in twists)])
    return Task(prompt, reply, [twist.constraint for twist in twists], TEXT_GUARD | {"any_of": [topic.stem]})


def question(rng: random.Random) -> Task:
    """Ask one question, with or without a given first word."""
    topic = rng.choice(TOPICS)
    first = rng.choice(sorted(BANK["questions"]))
    request = rng.choice(REQUESTS["question"])
    reply = rng.choice(BANK["questions"][first]).format(topic.name, topic.be, rng.choice(topic.adjectives))
    constraints: list[Constraint] = [{"kind": "question"}]
    prompt = request.format(topic.name)
    if rng.random() < 0.7:
        prompt += f' that starts with "{first}"'
        constraints.append({"kind": "starts_with", "text": first})
    return Task(f"{prompt}.", reply, constraints, TEXT_GUARD | {"any_of": [topic.stem]})


def title(rng: random.Random) -> Task:
    """Ask for a title in double angle brackets."""
    topic = rng.choice(TOPICS)
    request = rng.choice(REQUESTS["title"])
    form = rng.choice(("A Day with {0}", "The Secret of {0}", "All about {0}", "My Life with {0}", "A Song for {0}"))
    reply = f"<<{form.format(topic.name.title())}>>"
    guard = {"min_words": 2, "max_words": 30, "any_of": [topic.stem]}
    work = rng.choice(("story", "book", "song", "poem", "movie", "game", "lesson"))
    return Task(request.format(topic.name, work), reply, [ifeval("detectable_format:title")], guard)


VERSION = 1
"""Increased when the same size and seed give other rows than before; part of every data stage's key."""

FAMILIES: dict[str, Family] = {
    **{name: twisted((name,)) for name in TWISTS},
    "combined": combined,
    "sentence_count": lists.sentence_count,
    "exact_words": lists.exact_words,
    "few_words": lists.few_words,
    "question": question,
    "title": title,
    "keyword_twice": lists.keyword_twice,
    "bullets": lists.bullets,
    "numbered": lists.numbered,
    "separated": lists.separated,
    "no_comma": lists.no_comma,
    "json": lists.json_object,
    "choose": lists.choose,
    "sort": lists.sort_words,
    "arithmetic": lists.arithmetic,
    "letter_count": lists.letter_count,
    "repeat": lists.repeat,
    "copy": lists.copy,
}
"""Every family by name, as in ``EMBEDDED_FAMILIES``; the name is the row's ``source`` after ``embedded/``."""

TRIES = 2000
"""Attempts to write a prompt that no row has yet."""


def generate(size: int, seed: int, families: Iterable[str] | None = None) -> list[Row]:
    """Return ``size`` shuffled rows with different prompts; the families (all by default) take turns.

    Raises ``UserError`` if a family does not exist, or if it has no more different prompts.
    """
    names = list(families) if families is not None else list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"embedded data: there is no family '{name}'.{suggest(name, FAMILIES)}")
    # One random stream per family, so another family does not change the rows of these.
    streams = {name: random.Random(f"{seed}:{name}") for name in names}  # noqa: S311  (data, not secrecy)
    used: set[str] = set()
    rows: list[Row] = []
    for index in range(size):
        name = names[index % len(names)]
        rows.append(_row(name, _new_task(name, streams[name], used, len(rows))))
    # The turns of the families must not show in the order of the rows.
    random.Random(f"{seed}:order").shuffle(rows)  # noqa: S311
    return rows


def _new_task(name: str, rng: random.Random, used: set[str], count: int) -> Task:
    """Return a task whose prompt is not in ``used``, and add it; ``count`` is the number of rows so far."""
    for _ in range(TRIES):
        task = FAMILIES[name](rng)
        # Compare prompts as splits do: rows that differ only in punctuation would be one question.
        key = normalized(task.prompt)
        if key not in used:
            used.add(key)
            return task
    raise UserError(
        f"embedded data: the family '{name}' has no more different prompts after {count} rows in all; ask for fewer "
        "rows or for more families."
    )


def _row(name: str, task: Task) -> Row:
    checks = {"constraints": task.constraints, "guard": task.guard}
    return {
        "id": f"embedded-{hashlib.sha256(task.prompt.encode()).hexdigest()[:12]}",
        "source": f"embedded/{name}",
        "prompt": [user(task.prompt)],
        "checks": json.dumps(checks, sort_keys=True),
        "completion": [assistant(task.reply)],
    }
