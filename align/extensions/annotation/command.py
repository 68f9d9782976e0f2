"""``align annotate``: choose the better of two answers in the terminal, and report on a set of annotations.

Answers are models' texts, so they are hostile: hidden characters are escaped, and every line of a text has a bar in
front, so a text cannot imitate the program's own lines. Heavy imports wait until the command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from align.cli.parser import add_store, print_json
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.extensions.annotation.pairs import Selection
    from align.extensions.annotation.questions import Question
    from align.extensions.annotation.session import Reply, Session
    from align.store.annotations import AnnotationSet, Verdict
    from align.store.store import Store

BAR = "  | "
HELP = (
    "1 left is much better   2 left is better   3 tie   4 right is better   5 right is much better   0 both are bad\n"
    "t tags   r rewrite the answer   c comment   s skip   u undo   q quit   ? help"
)
VERDICTS: dict[str, tuple[Verdict, str | None]] = {
    "1": ("much_better", "left"),
    "2": ("better", "left"),
    "3": ("tie", None),
    "4": ("better", "right"),
    "5": ("much_better", "right"),
    "0": ("both_bad", None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("set", metavar="SET", help="name of the set of annotations: helpful-1")
    parser.add_argument(
        "--pairs",
        metavar="SOURCE",
        help="add pairs: a .jsonl file, or the key or PIPELINE:STAGE of a sample, synthesize or evaluate stage",
    )
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="pairs of each prompt of a stage (1)")
    parser.add_argument("--name", metavar="NAME", help="the annotator's pseudonym; without it nothing is asked")
    parser.add_argument("--overlap", type=float, metavar="SHARE", help="pairs that every annotator answers (0.2)")
    parser.add_argument("--duplicates", type=float, metavar="SHARE", help="pairs that appear a second time (0.1)")
    parser.add_argument("--gold-every", type=int, metavar="N", help="every N questions are a gold question (10)")
    parser.add_argument(
        "--order",
        choices=["random", "closeness", "disagreement"],
        help="random, closest scores first, or pairs first on which reward models disagree (random)",
    )
    parser.add_argument("--report", action="store_true", help="print agreement, comparisons and whether to stop")
    parser.add_argument("--export", metavar="FILE", help="write the set as Label Studio's JSON")
    parser.add_argument("--import", dest="import_", metavar="FILE", help="add pairs and answers of Label Studio's JSON")
    parser.add_argument("--delete-annotator", metavar="NAME", help="delete all answers of an annotator")
    add_store(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``align annotate`` and return exit code 0."""
    from align.runner.open_store import open_store
    from align.store.annotations import AnnotationSet, check_name, find_set

    actions = [name for name in ("report", "export", "delete_annotator", "name") if getattr(options, name)]
    if len(actions) > 1:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in actions)
        raise UserError(f"align annotate: {words} do not go together; use one of them.")
    if options.per_prompt < 1:
        raise UserError(f"--per-prompt is {options.per_prompt}; it is at least 1.")
    if options.name:
        check_name(options.name, "--name")
    check_name(options.set, "The set")
    store = open_store(None, options.store)
    annotations = AnnotationSet(store.root, options.set)
    _change(options, store, annotations)
    find_set(store.root, options.set)
    if options.report:
        return _report(options, store)
    if options.export:
        from align.extensions.annotation.label_studio import write_tasks

        print(printable(f"{write_tasks(Path(options.export), annotations)} tasks in {options.export}"))
    elif options.delete_annotator:
        count = annotations.delete_annotator(options.delete_annotator)
        print(printable(f"{count} answers of '{options.delete_annotator}' are deleted"))
    elif options.name:
        from align.extensions.annotation.session import Session

        return TerminalSession(Session(store.root, options.set, options.name), sys.stdin, sys.stdout).run()
    elif not (options.pairs or options.import_):
        raise UserError("align annotate: --name gives your pseudonym, or --report, --export or --delete-annotator.")
    return 0


def _change(options: argparse.Namespace, store: Store, annotations: AnnotationSet) -> None:
    """Change the settings of the set, and add pairs and answers to it."""
    names = ("overlap", "duplicates", "gold_every", "order")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if changes or options.pairs or options.import_ or options.delete_annotator or options.name:
        store.require_writable()
    if changes:
        annotations.change_settings(**changes)
    if options.pairs:
        selection = _read_pairs(options)
        pairs = selection.pairs.values()
        print(printable(f"{annotations.add_pairs(pairs)} new pairs of {len(pairs)} in {options.pairs}"))
        for line in selection.explain(options.per_prompt):
            print(f"  {line}")
    if options.import_:
        from align.extensions.annotation.label_studio import import_tasks

        new_pairs, new_answers = import_tasks(Path(options.import_), annotations)
        print(printable(f"{new_pairs} new pairs and {new_answers} new answers of {options.import_}"))


def _read_pairs(options: argparse.Namespace) -> Selection:
    from align.cli.arguments import find_artifact
    from align.extensions.annotation.pairs import read_artifact_pairs, read_file_pairs

    source = Path(options.pairs)
    if source.suffix == ".jsonl":
        return read_file_pairs(source)
    if source.is_dir():
        return read_artifact_pairs(source, options.per_prompt)
    return read_artifact_pairs(find_artifact(options.pairs, options.store).path, options.per_prompt)


def _report(options: argparse.Namespace, store: Store) -> int:
    from align.extensions.annotation.report import make_report, report_lines
    from align.store.annotations import AnnotationSet

    annotations = AnnotationSet(store.root, options.set)
    report = make_report(annotations.pairs(), annotations.answers(), annotations.ledger())
    if options.json:
        print_json(report.to_json())
        return 0
    for line in report_lines(report):
        print(printable(line))
    return 0


@dataclass
class _Notes:
    """Tags and texts that an annotator wrote before the verdict."""

    tags: tuple[str, ...] = ()
    rewrite: str = ""
    comment: str = ""


class TerminalSession:
    """Shows one pair at a time and reads keys: single keys of a terminal, else one key a line."""

    def __init__(
        self, session: Session, source: TextIO, output: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.session, self.source, self.output, self.clock = session, source, output, clock

    def run(self) -> int:
        """Ask until all are answered or the annotator quits; return exit code 0. Every answer is on disk at once."""
        self._print(HELP)
        for line in filter(
            None, (self.session.explain_count(), self.session.conflict and f"! {self.session.conflict}")
        ):
            self._print(printable(line))
        try:
            while (question := self.session.next()) is not None:
                self._show(question)
                if not self._ask(question):
                    break
            else:
                self._print("No question is left.")
        except KeyboardInterrupt:
            self._print("")
        finally:
            self.session.close()
        answered, total = self.session.count()
        self._print(f"{answered} of {total} pairs answered by {self.session.annotator}. The same command continues.")
        return 0

    def _show(self, question: Question) -> None:
        answered, total = self.session.count()
        number = answered if question.repeat else answered + 1
        self._print(f"\n=== {number} of {total} ===")
        for message in question.pair.prompt:
            self._print_text(str(message["role"]), str(message["content"]))
        for side, text in zip(("LEFT", "RIGHT"), question.texts, strict=True):
            self._print_text(side, text)

    def _ask(self, question: Question) -> bool:
        """Read keys until the question is answered, skipped or replaced by an earlier one; False to quit."""
        from align.extensions.annotation.session import Reply

        notes, started = _Notes(), self.clock()
        while True:
            key = self._read_key()
            if key in ("", "q"):
                return False
            if key in VERDICTS:
                verdict, choice = VERDICTS[key]
                seconds = max(0.0, self.clock() - started)
                reply: Reply = Reply(verdict, choice, notes.tags, notes.rewrite, notes.comment, seconds)
                try:
                    self.session.answer(question, reply)
                except UserError as error:
                    self._print(f"! {error}")
                return True
            if key == "s":
                self.session.skip(question)
                return True
            if key == "u":
                if self.session.undo() is not None:
                    self._print("The last answer is withdrawn.")
                    return True
                self._print("There is no answer to undo.")
            else:
                self._note(key, notes)

    def _note(self, key: str, notes: _Notes) -> None:
        if key == "t":
            notes.tags = tuple(
                tag.strip() for tag in self._read_line("tags, separated by commas: ").split(",") if tag.strip()
            )
        elif key == "r":
            notes.rewrite = self._read_line(r"a better answer (\n for a new line): ").replace("\\n", "\n")
        elif key == "c":
            notes.comment = self._read_line("comment: ")
        else:
            self._print(HELP)

    # ---- input and output ----

    def _read_key(self) -> str:
        """Return the next key; empty at the end of input."""
        if not self.source.isatty():
            line = self._read_line("> ", is_stripped=False)
            return (line.strip() or "?")[:1] if line else ""
        with _single_keys(self.source) as descriptor:
            # Only now: a key that is typed at once must not wait for Enter.
            self.output.write("> ")
            self.output.flush()
            key = os.read(descriptor, 1).decode("latin-1")
        self._print(printable(key))
        return "" if key in ("", "\x04") else key

    def _read_line(self, question: str, is_stripped: bool = True) -> str:
        self.output.write(question)
        self.output.flush()
        line = self.source.readline()
        return line.strip() if is_stripped else line

    def _print_text(self, title: str, text: str) -> None:
        """Print a foreign text under its title, with a bar in front of every line."""
        self._print(f"{printable(title)}:")
        for line in text.split("\n"):
            self._print(BAR + printable(line))

    def _print(self, line: str) -> None:
        print(line, file=self.output, flush=True)


@contextlib.contextmanager
def _single_keys(source: TextIO) -> Iterator[int]:
    """Yield the descriptor of a terminal that returns each key without waiting for Enter."""
    import termios
    import tty

    descriptor = source.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        # TCSAFLUSH: keys that were pressed before the question was open answer nothing.
        tty.setcbreak(descriptor, termios.TCSAFLUSH)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
