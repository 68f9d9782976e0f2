"""A store's second place, in a bucket that machines without a common folder share: what is finished goes to and fro.

Layout: ``<kind>/<12 hex>/record.json`` as in a folder, put last and only where none is, so of two machines that made
the same one publishes; the files lie beside it under ``<12 hex of their digests>/``, so an upload that was cut off goes
on where it was and two uploads never mix. ``locks/<kind>-<12 hex>/<number>`` are the claims of stages that are being
made.
Left out: deleting (who else reads there is not known here). Knows no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from align.errors import UserError
from align.store.artifacts import Artifact
from align.store.atomic_write import sync_folder
from align.store.fingerprint import digest, file_digest
from align.store.json_files import DamagedFile, as_json
from align.store.locks import Hold, Lock
from align.store.object_store import CHUNK, Bucket
from align.store.record import RECORD, DamagedArtifact, DamagedRecord, parse_record, write_record
from align.store.retry import Patience, StoreUnreachable
from align.store.sealed import seal
from align.store.store import SHORT, Store

T = TypeVar("T")
UNRECORDED = ("log.txt", "events.jsonl")
FETCHED = ".fetched"
SECONDS_ONCE_AWAY = 5.0
"""Patience with a bucket that was away at the last call, too: a run of many stages must not wait for each."""


class Remote:
    """The artifacts in a bucket. Calls raise ``StoreUnreachable`` where it does not answer for the store's patience."""

    def __init__(self, store: Store, address: str) -> None:
        self.store, self.bucket = store, Bucket(address)
        self.away = False
        self._known: dict[str, dict[str, Any] | None] = {}

    @property
    def address(self) -> str:
        """Where it is, as the user wrote it."""
        return self.bucket.address

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record of ``key``, or None where nobody has published it. What was found once is not asked again.

        Raises ``DamagedRecord``.
        """
        place = _place(kind, key)
        if self._known.get(place) is None:
            data = self._try(lambda: self.bucket.get(f"{place}/{RECORD}"))
            self._known[place] = None if data is None else self._record(place, data, kind, key)
        return self._known[place]

    def all(self) -> list[dict[str, Any]]:
        """Every intact record, oldest first."""
        return self.survey()[0]

    def survey(self) -> tuple[list[dict[str, Any]], list[DamagedRecord]]:
        """Every intact record, oldest first, and what is wrong with the others."""
        places = [PurePosixPath(path).parent for path in self._try(lambda: self.bucket.sizes("")) if _is_record(path)]
        intact, damaged = [], []
        for place in places:
            data = self._try(lambda place=place: self.bucket.get(f"{place}/{RECORD}"))  # type: ignore[misc]
            if data is None:
                continue
            try:
                intact.append(self._record(str(place), data, place.parent.name, place.name))
            except DamagedRecord as error:
                damaged.append(error)
        return sorted(intact, key=lambda record: str(record["created"])), damaged

    def fetch(self, kind: str, key: str, stage: str = "") -> Artifact | None:
        """Bring an artifact into the store, every digest checked; None where it is not there.

        Goes on where an earlier fetch was cut off. Raises ``UserError`` for files that are not what their record says.
        """
        record = self.find(kind, key)
        if record is None:
            return None
        with self.store.lock(kind, key, lambda _: None):
            found = self.store.find(kind, key, stage)  # another process may have fetched it meanwhile
            if found is not None:
                return found
            folder = self.store.folder(kind, key)
            draft = folder.with_name(folder.name + FETCHED)
            draft.mkdir(parents=True, exist_ok=True)
            place = f"{_place(kind, key)}/{_content(record)}"
            for name, entry in record["outputs"].items():
                self._fetch_file(f"{place}/{name}", draft / name, entry)
            for name in UNRECORDED:
                data = self._try(lambda name=name: self.bucket.get(f"{place}/{name}"))  # type: ignore[misc]
                if data is not None:
                    (draft / name).write_bytes(data)
            write_record(draft, record)
            if folder.exists():  # without a record, so of no use
                shutil.rmtree(folder)
            draft.rename(folder)
            sync_folder(folder.parent)
        return self.store.find(kind, key, stage)

    def push(self, artifact: Artifact, replace: bool = False) -> bool:
        """Publish an artifact; False where another machine published one of this key first, which stays.

        With ``replace`` it gives way. What an interrupted push has left is used, unless something is to be replaced.
        """
        record = artifact.record
        place = _place(record["kind"], record["key"])
        content = f"{place}/{_content(record)}"
        problems = self.store.problems(artifact, thorough=False)
        if problems:
            text = f"{problems[0].path} {problems[0].what}, so it was not uploaded to {self.address}."
            raise DamagedArtifact(text, artifact.stage)
        there = {} if replace else self._try(lambda: self.bucket.sizes(content))
        for name, entry in record["outputs"].items():
            if there.get(f"{content}/{name}") != entry["bytes"]:
                self._upload(f"{content}/{name}", artifact.path / name)
        for name in UNRECORDED:
            if (artifact.path / name).is_file():
                self._upload(f"{content}/{name}", artifact.path / name)
        data = json.dumps(seal(as_json(record)), indent=1).encode()
        if not self._try(lambda: self.bucket.put_new(f"{place}/{RECORD}", data)):
            self._known.pop(place, None)
            try:
                other = self.find(record["kind"], record["key"])
            except DamagedRecord:
                if not replace:
                    raise
                other = None
                self._try(lambda: self.bucket.put(f"{place}/{RECORD}", data))
            if other is not None and other["created"] != record["created"]:
                if not replace:
                    return False
                self._try(lambda: self.bucket.put(f"{place}/{RECORD}", data))
                if _content(other) != _content(record):
                    self._drop(f"{place}/{_content(other)}")
        self._known[place] = record
        return True

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, on_wait: Callable[[str], None]) -> Iterator[Hold]:
        """Hold the stage's lock among the machines that share the bucket."""
        claims = BucketClaims(self.bucket, f"locks/{kind}-{key[:SHORT]}")
        hold = Lock(claims, self.store.lease).acquire(on_wait, self._patience())
        self._known.pop(_place(kind, key), None)  # who had it may just have published
        try:
            yield hold
        finally:
            with contextlib.suppress(StoreUnreachable, UserError):  # it then passes on when its lease is over
                self._try(hold.release)

    def _upload(self, path: str, file: Path) -> None:
        self._try(lambda: self.bucket.upload(path, file))

    def _drop(self, prefix: str) -> None:
        for path in self._try(lambda: self.bucket.sizes(prefix)):
            self._try(lambda path=path: self.bucket.delete(path))  # type: ignore[misc]

    def _fetch_file(self, path: str, target: Path, entry: dict[str, Any]) -> None:
        """One file, from where an earlier fetch stopped; begun anew once if the whole is wrong."""
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            have = target.stat().st_size if target.exists() else 0
            with target.open("ab") as file:
                if have > entry["bytes"]:
                    file.truncate(have := 0)
                while have < entry["bytes"]:
                    length = min(CHUNK, entry["bytes"] - have)
                    data = self._try(lambda have=have, length=length: self.bucket.get_range(path, have, length))  # type: ignore[misc]
                    if not data:
                        break
                    file.write(data)
                    have += len(data)
                file.flush()
                os.fsync(file.fileno())
            if have == entry["bytes"] and file_digest(target) == entry["sha256"]:
                os.utime(target, ns=(entry["mtime_ns"], entry["mtime_ns"]))  # else its digest is taken at every look
                return
            target.unlink()
            if attempt == 2:
                what = "is missing" if have == 0 and entry["bytes"] else "is not what its record says"
                raise UserError(
                    f"{self.address}/{path} {what} (sha256 {entry['sha256'][:12]}…, {entry['bytes']} bytes): the stage "
                    "found there is damaged. `--rebuild STAGE` makes it again and replaces it there."
                )

    def _record(self, place: str, data: bytes, kind: str, key: str) -> dict[str, Any]:
        """A record that was read, checked: whoever wrote it may have been anybody, and paths are made of it."""
        try:
            record = parse_record(data)
            if record["kind"] != kind or record["key"][: len(key)] != key:
                raise DamagedFile(f"is the record of {record['kind']}/{record['key'][:SHORT]}")
        except DamagedFile as error:
            address = f"{self.address}/{place}/{RECORD}"
            remedy = "Delete that object and run again, or run with --rebuild: the stage is made anew."
            raise DamagedRecord(address, str(error), remedy=remedy) from None
        return record

    def _patience(self) -> Patience:
        whole = self.store.patience
        seconds = min(SECONDS_ONCE_AWAY, whole.seconds) if self.away else whole.seconds
        return Patience(self.address, seconds, whole.say)

    def _try(self, action: Callable[[], T]) -> T:
        try:
            found = self._patience().keep_trying(action)
        except StoreUnreachable:
            self.away = True
            raise
        self.away = False
        return found


class BucketClaims:
    """Claims of a lock as objects: a number is given once by a put that makes and never replaces."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix

    def prepare(self) -> None:
        """A bucket has no folders to make."""

    def numbers(self) -> list[int]:
        """Numbers of the objects there are."""
        names = [PurePosixPath(path).name for path in self.bucket.sizes(self.prefix)]
        return [int(name) for name in names if name.isdecimal()]

    def read(self, number: int) -> bytes:
        """An object's bytes; empty where there is none."""
        return self.bucket.get(f"{self.prefix}/{number}") or b""

    def make(self, number: int, content: bytes) -> bool:
        """Put where none is."""
        return self.bucket.put_new(f"{self.prefix}/{number}", content)

    def write(self, number: int, content: bytes) -> None:
        """Replace the object, unless it is gone."""
        if not self.read(number):
            raise FileNotFoundError(self.describe(number))
        self.bucket.put(f"{self.prefix}/{number}", content)

    def drop(self, number: int) -> None:
        """Delete the object."""
        self.bucket.delete(f"{self.prefix}/{number}")

    def look_anew(self) -> None:
        """Object stores show every put to everybody at once."""

    def describe(self, number: int) -> str:
        """The object's address."""
        return f"{self.bucket.address}/{self.prefix}/{number}"


def _place(kind: str, key: str) -> str:
    return f"{kind}/{key[:SHORT]}"


def _content(record: dict[str, Any]) -> str:
    """The name of what an artifact holds."""
    return digest({name: entry["sha256"] for name, entry in record["outputs"].items()})[:SHORT]


def _is_record(path: str) -> bool:
    return len(PurePosixPath(path).parts) == 3 and path.endswith(f"/{RECORD}")
