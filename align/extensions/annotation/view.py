"""The view ``annotate``: sets of annotations, questions to people, and reports, as ``align annotate`` has them.

An answer is in the journal before its response is sent. The browser names each answer, so it may send an answer again
after the studio was killed: the journal has it once.
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from align.errors import UserError
from align.extensions.annotation.label_studio import add_tasks, export_tasks
from align.extensions.annotation.pairs import SAMPLES, Selection, parse_pairs, read_artifact_pairs
from align.extensions.annotation.questions import Question
from align.extensions.annotation.report import make_report, report_lines
from align.extensions.annotation.session import Reply, Session
from align.store.annotations import AnnotationSet, Verdict, check_name, find_set, list_sets
from align.store.json_files import DamagedFile, parse_json, parse_object
from align.studio.context import NotFound, StudioContext, checked_name

MAX_TEXT, MAX_TAGS = 100_000, 50
PAIR_KINDS = ("sample", "synthesize", "evaluate")
"""Kinds of stages whose answers make pairs."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Settings(_Body):
    """Settings of a set; None leaves a setting as it is."""

    overlap: float | None = None
    duplicates: float | None = None
    gold_every: int | None = None
    order: Literal["random", "closeness", "disagreement"] | None = None


class NewPairs(_Body):
    """Pairs for a set: of a finished stage, or JSON lines as a file has them; and the settings of the set."""

    run: str | None = None
    stage: str | None = None
    per_prompt: int = Field(1, ge=1, le=1000)
    lines: str | None = None
    settings: Settings = Settings()


class Reference(_Body):
    """An annotator, and the pair on the screen."""

    annotator: str
    pair: str = ""


class NewAnswer(Reference):
    """A reply to a question. ``id`` is chosen by the browser and stays the same if the request is repeated."""

    id: str = Field(pattern="^[0-9a-f]{32}$")
    verdict: Verdict
    choice: Literal["left", "right"] | None = None
    tags: list[str] = Field([], max_length=MAX_TAGS)
    rewrite: str = Field("", max_length=MAX_TEXT)
    comment: str = Field("", max_length=MAX_TEXT)
    seconds: float = Field(0.0, ge=0, le=86_400)


class Tasks(_Body):
    """The text of a file of Label Studio."""

    text: str


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the view."""
    router = APIRouter(prefix="/annotate")
    view = Annotations(context)
    router.add_api_route("", view.list_sets, methods=["GET"])
    router.add_api_route("/sources", view.list_sources, methods=["GET"])
    router.add_api_route("/{name}", view.read_set, methods=["GET"])
    router.add_api_route("/{name}/pairs", view.add_pairs, methods=["POST"])
    router.add_api_route("/{name}/settings", view.change_settings, methods=["POST"])
    router.add_api_route("/{name}/questions", view.read_questions, methods=["GET"])
    router.add_api_route("/{name}/answers", view.answer, methods=["POST"])
    router.add_api_route("/{name}/skip", view.skip, methods=["POST"])
    router.add_api_route("/{name}/undo", view.undo, methods=["POST"])
    router.add_api_route("/{name}/export", view.export, methods=["GET"])
    router.add_api_route("/{name}/import", view.import_tasks, methods=["POST"])
    router.add_api_route("/{name}/delete-annotator", view.delete_annotator, methods=["POST"])
    return router


class Annotations:
    """The answers of the view, and the open session of each annotator."""

    def __init__(self, context: StudioContext) -> None:
        self.context = context
        self.root = context.store.root
        self.index = context.index
        self._sessions: dict[tuple[str, str], _OpenSession] = {}
        self._lock = threading.Lock()

    # ---- sets ----

    def list_sets(self) -> dict[str, Any]:
        """Return every set with its numbers of pairs and answers."""
        sets: list[dict[str, Any]] = []
        for name in list_sets(self.root):
            try:
                annotations = find_set(self.root, name)
                pairs = annotations.pairs()
                answers = [answer for answer in annotations.answers() if answer.pair in pairs]
            except UserError as error:
                sets.append({"name": name, "error": str(error)})
                continue
            answered = len({answer.pair for answer in answers})
            sets.append(
                {"name": name, "pairs": len(pairs), "answered": answered, "annotators": annotations.annotators()}
            )
        return {"sets": sets}

    def list_sources(self) -> dict[str, Any]:
        """Return the finished stages whose answers make pairs."""
        runs = self.index.read()
        sources = []
        for name, run in runs.runs.items():
            for stage, (kind, key) in run.outline.stages.items():
                if kind in PAIR_KINDS and (self.context.store.folder(kind, key) / SAMPLES).is_file():
                    sources.append({"run": name, "stage": stage, "kind": kind, "key": key[:12]})
        return {"sources": sources}

    def read_set(self, name: str) -> dict[str, Any]:
        """Return the settings and the report of a set."""
        annotations = self._find(name)
        report = make_report(annotations.pairs(), annotations.answers(), annotations.ledger())
        return {
            "name": name,
            "settings": annotations.settings().model_dump(),
            "report": _finite(report.to_json()),
            "lines": report_lines(report),
        }

    def add_pairs(self, name: str, request: NewPairs) -> dict[str, Any]:
        """Add pairs to a set, which is made if there is none."""
        self.context.require_writable()
        annotations = AnnotationSet(self.root, check_name(name, "The set"))
        selection = self._read_pairs(request)
        self._change(annotations, request.settings)
        added = annotations.add_pairs(selection.pairs.values())
        self._forget(name)
        return {"added": added, "read": len(selection.pairs), "skipped": selection.explain(request.per_prompt)}

    def _read_pairs(self, request: NewPairs) -> Selection:
        if (request.lines is None) == (request.run is None or request.stage is None):
            raise UserError("Name a run and a stage, or give lines of pairs.")
        if request.lines is not None:
            return parse_pairs(_parse_lines(request.lines), "The pairs")
        assert request.run is not None and request.stage is not None
        outline = self.context.outline(request.run)
        if request.stage not in outline.stages:
            raise NotFound(f"The run '{request.run}' has no stage '{checked_name('stage', request.stage)}'.")
        kind, key = outline.stages[request.stage]
        return read_artifact_pairs(self.context.artifact_folder(kind, key), request.per_prompt)

    def change_settings(self, name: str, request: Settings) -> dict[str, Any]:
        """Change the settings of a set."""
        self.context.require_writable()
        annotations = self._find(name)
        self._change(annotations, request)
        self._forget(name)
        return annotations.settings().model_dump()

    def _change(self, annotations: AnnotationSet, settings: Settings) -> None:
        changes = settings.model_dump(exclude_none=True)
        if changes:
            annotations.change_settings(**changes)

    # ---- questions ----

    def read_questions(self, name: str, annotator: str) -> dict[str, Any]:
        """Return the question of an annotator, the one after it, and how far the annotator is."""
        with self._session(name, annotator) as session:
            return _questions_json(session)

    def answer(self, name: str, request: NewAnswer) -> dict[str, Any]:
        """Write an answer to the journal, and return the next questions."""
        with self._session(name, request.annotator) as session:
            question = session.question_of(request.pair)
            if question is None:
                raise NotFound(f"The set '{name}' has no pair '{request.pair[:40]}'.")
            due = session.next()
            if due is not None and due.pair.id == request.pair:
                question = due
            elif question.repeat:
                # The pair was answered meanwhile, and its hidden duplicate is not due: this is no second showing.
                question = replace(question, repeat=False)
            reply = Reply(
                request.verdict, request.choice, request.tags, request.rewrite, request.comment, request.seconds
            )
            try:
                session.answer(question, reply, request.id)
            except ValueError as error:
                raise UserError(str(error)) from None
            return _questions_json(session)

    def skip(self, name: str, request: Reference) -> dict[str, Any]:
        """Leave a question for another session."""
        with self._session(name, request.annotator) as session:
            question = session.question_of(request.pair)
            if question is not None:
                session.skip(question)
            return _questions_json(session)

    def undo(self, name: str, request: Reference) -> dict[str, Any]:
        """Withdraw the last answer, and ask its question again."""
        with self._session(name, request.annotator) as session:
            if session.undo() is None:
                raise UserError("There is no answer to undo.")
            return _questions_json(session)

    # ---- exchange ----

    def export(self, name: str) -> JSONResponse:
        """Return the set as Label Studio's JSON, for a download."""
        annotations = self._find(name)
        tasks = export_tasks(annotations.pairs(), annotations.answers())
        return JSONResponse(tasks, headers={"content-disposition": f'attachment; filename="{name}.json"'})

    def import_tasks(self, name: str, request: Tasks) -> dict[str, Any]:
        """Add the pairs and answers of Label Studio's JSON."""
        self.context.require_writable()
        annotations = AnnotationSet(self.root, check_name(name, "The set"))
        try:
            tasks = parse_json(request.text.encode())
        except DamagedFile as error:
            raise UserError(f"The file {error}.") from None
        pairs, answers = add_tasks(tasks, "The file", annotations)
        self._forget(name)
        return {"pairs": pairs, "answers": answers}

    def delete_annotator(self, name: str, request: Reference) -> dict[str, Any]:
        """Delete all answers of an annotator."""
        self.context.require_writable()
        count = self._find(name).delete_annotator(request.annotator)
        self._forget(name)
        return {"deleted": count}

    # ---- sessions ----

    def _find(self, name: str) -> AnnotationSet:
        if name not in list_sets(self.root):
            raise NotFound(f"The store has no set '{checked_name('set', name)}'.")
        return find_set(self.root, name)

    def _session(self, name: str, annotator: str) -> _OpenSession:
        """Return the open session of an annotator, whose lock is a context."""
        self.context.require_writable()
        self._find(name)
        check_name(annotator, "Your name")
        with self._lock:
            if (name, annotator) not in self._sessions:
                self._sessions[name, annotator] = _OpenSession(Session(self.root, name, annotator))
            return self._sessions[name, annotator]

    def _forget(self, name: str) -> None:
        """Open the sessions of a set anew, because its pairs, settings or answers have changed."""
        with self._lock:
            for key in [key for key in self._sessions if key[0] == name]:
                self._sessions.pop(key).session.close()


class _OpenSession:
    """A session that one request uses at a time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()

    def __enter__(self) -> Session:
        self._lock.acquire()
        return self.session

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _questions_json(session: Session) -> dict[str, Any]:
    question = session.next()
    done, total = session.count()
    following = None if question is None else session.following(question)
    return {
        "question": _question_json(question),
        "following": _question_json(following),
        "done": done,
        "total": total,
        "notes": [text for text in (session.explain_count(), session.conflict) if text],
    }


def _question_json(question: Question | None) -> dict[str, Any] | None:
    """Return a pair as an annotator sees it: no systems, no scores, and no mark of a duplicate or a gold question."""
    if question is None:
        return None
    left, right = question.texts
    messages = [{"role": str(each["role"]), "content": str(each["content"])} for each in question.pair.prompt]
    return {"pair": question.pair.id, "prompt": messages, "left": left, "right": right}


def _parse_lines(text: str) -> list[tuple[str, dict[str, Any]]]:
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            lines.append((f"line {number}", parse_object(line.encode("utf-8", "surrogatepass"))))
        except DamagedFile as error:
            raise UserError(f"line {number} {error}.") from None
    return lines


def _finite(value: Any) -> Any:
    """Return plain data in which numbers that are not finite are None, because JSON has no such numbers."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
