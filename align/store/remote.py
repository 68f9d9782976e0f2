"""Finished stages in a bucket, for machines without a common folder.

Layout: ``<kind>/<12 hex>/record.json`` as in a folder. It is put last and only if there is none, so of two machines
that ran the same stage one publishes. The files are next to it under ``<12 hex of their digests>/``, so an interrupted
upload continues where it was, and two uploads never mix. ``locks/<kind>-<12 hex>/<number>`` are the claims of stages
that are running. Leaves out deleting (who else reads the bucket is not known here) and the local store, which is
``store.py``'s. Knows no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec, TypeVar

from align.errors import UserError
from align.store.artifacts import EVENTS, LOG, Artifact
from align.store.claims import BucketClaims
from align.store.fingerprint import digest, file_digest
from align.store.json_files import DamagedFile, seal, write_bytes_atomically
from align.store.locks import Hold, Lease, Lock
from align.store.object_store import CHUNK, Bucket
from align.store.record import RECORD, SHORT, DamagedArtifact, DamagedRecord, find_problems, parse_record, write_record
from align.store.retry import Retry, StoreUnreachable

P = ParamSpec("P")
T = TypeVar("T")
SECONDS_ONCE_AWAY = 5.0
"""Time for retries when the last call failed too: a run of many stages must not wait for each."""


class Remote:
    """The artifacts in a bucket. Calls raise ``StoreUnreachable`` if it does not answer in time."""

    def __init__(self, address: str, lease: Lease, retry: Retry) -> None:
        """``retry`` is the local store's, whose time and log the bucket's own retries share."""
        self.bucket = Bucket(address)
        self.lease = lease
        self.retry = retry
        self.is_away = False
        """True when the last call failed because the bucket did not answer."""
        self._known: dict[str, dict[str, Any] | None] = {}
        """Path of an artifact → its record, once found."""

    @property
    def address(self) -> str:
        """The bucket's address, as the user wrote it."""
        return self.bucket.address

    # ---- records ----

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the record of ``key``, or None if it is not published. A record is read only once.

        Raises ``DamagedRecord``.
        """
        path = _path(kind, key)
        # Absence is not remembered: another machine may publish at any time.
        if self._known.get(path) is None:
            data = self._call(self.bucket.get, f"{path}/{RECORD}")
            self._known[path] = None if data is None else self._parse(path, data, kind, key)
        return self._known[path]

    def all(self) -> list[dict[str, Any]]:
        """Return every intact record, oldest first."""
        return self.survey()[0]

    def survey(self) -> tuple[list[dict[str, Any]], list[DamagedRecord]]:
        """Return every intact record, oldest first, and the errors of the damaged records."""
        paths = [PurePosixPath(path).parent for path in self._call(self.bucket.sizes, "") if _is_record(path)]
        intact = []
        damaged = []
        for path in paths:
            data = self._call(self.bucket.get, f"{path}/{RECORD}")
            # Another machine may have deleted the object after it was listed.
            if data is None:
                continue
            try:
                intact.append(self._parse(str(path), data, path.parent.name, path.name))
            except DamagedRecord as error:
                damaged.append(error)
        return sorted(intact, key=lambda record: str(record["created"])), damaged

    def _parse(self, path: str, data: bytes, kind: str, key: str) -> dict[str, Any]:
        """Return a checked record: anybody may have written it, and local paths are made from it."""
        try:
            record = parse_record(data)
            if record["kind"] != kind or record["key"][: len(key)] != key:
                raise DamagedFile(f"is the record of {record['kind']}/{record['key'][:SHORT]}")
        except DamagedFile as error:
            address = f"{self.address}/{path}/{RECORD}"
            remedy = "Delete that object and run again, or run with --rebuild."
            raise DamagedRecord(address, str(error), remedy=remedy) from None
        return record

    # ---- files ----

    def download(self, record: dict[str, Any], folder: Path) -> None:
        """Download an artifact's files and its record into ``folder``, and check every digest.

        Continues an earlier download. Raises ``UserError`` for files that differ from their record.
        """
        folder.mkdir(parents=True, exist_ok=True)
        prefix = f"{_path(record['kind'], record['key'])}/{_content_name(record)}"
        for name, entry in record["outputs"].items():
            self._download_file(f"{prefix}/{name}", folder / name, entry)
        for name in (LOG, EVENTS):  # no digest covers them
            data = self._call(self.bucket.get, f"{prefix}/{name}")
            if data is not None:
                write_bytes_atomically(folder / name, data)
        # The record comes last, as in every artifact: if it is there, all files are.
        write_record(folder, record)

    def _download_file(self, path: str, target: Path, entry: dict[str, Any]) -> None:
        """Download one file from where an earlier download stopped; start over once if the result is wrong."""
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            size = self._append_rest(path, target, entry["bytes"])
            if size == entry["bytes"] and file_digest(target) == entry["sha256"]:
                # With the recorded time the file need not be hashed at every later look.
                os.utime(target, ns=(entry["mtime_ns"], entry["mtime_ns"]))
                return
            # The part from an earlier download may have been damaged: the second attempt starts at the beginning.
            target.unlink()
            if attempt == 2:
                problem = "is missing" if size == 0 and entry["bytes"] else "is not what its record says"
                raise UserError(
                    f"{self.address}/{path} {problem} (sha256 {entry['sha256'][:12]}…, {entry['bytes']} bytes): the "
                    "stage found there is damaged. `--rebuild STAGE` makes it again and replaces it there."
                )

    def _append_rest(self, path: str, target: Path, total: int) -> int:
        """Append what a file lacks of its ``total`` bytes; returns its size."""
        size = target.stat().st_size if target.exists() else 0
        with target.open("ab") as file:
            if size > total:
                size = 0
                file.truncate(0)
            while size < total:
                data = self._call(self.bucket.get_range, path, size, min(CHUNK, total - size))
                if not data:
                    break
                file.write(data)
                size += len(data)
            # On disk before the store's rename makes the artifact visible.
            file.flush()
            os.fsync(file.fileno())
        return size

    def push(self, artifact: Artifact, replace: bool = False) -> bool:
        """Publish an artifact; returns False if another machine published this key first, which stays.

        With ``replace`` the other artifact is replaced. What an interrupted push has uploaded is used, unless
        ``replace``.
        """
        record = artifact.record
        path = _path(record["kind"], record["key"])
        prefix = f"{path}/{_content_name(record)}"
        # Damage here must not spread to other machines.
        problems = self.retry.call(lambda: find_problems(artifact, thorough=False))
        if problems:
            text = f"{problems[0].path} {problems[0].description}, so it was not uploaded to {self.address}."
            raise DamagedArtifact(text, artifact.stage)
        # 1. Upload the files that are not there yet. Until the record is there, no machine reads them.
        #    With ``replace`` all are uploaded: the objects there may be damaged, which their sizes do not tell.
        uploaded = {} if replace else self._call(self.bucket.sizes, prefix)
        for name, entry in record["outputs"].items():
            if uploaded.get(f"{prefix}/{name}") != entry["bytes"]:
                self._call(self.bucket.upload, f"{prefix}/{name}", artifact.path / name)
        for name in (LOG, EVENTS):  # no digest covers them
            if (artifact.path / name).is_file():
                self._call(self.bucket.upload, f"{prefix}/{name}", artifact.path / name)
        # 2. Put the record if there is none: of several machines a single machine succeeds.
        data = json.dumps(seal(record, str), indent=1).encode()
        is_new = self._call(self.bucket.put_new, f"{path}/{RECORD}", data)
        # 3. If another machine's record is there, only one record counts.
        if not is_new and not self._resolve_conflict(record, data, replace):
            return False
        self._known[path] = record
        return True

    def _resolve_conflict(self, record: dict[str, Any], data: bytes, replace: bool) -> bool:
        """Decide between ``record``, with its JSON ``data``, and the record that is there; True if ``record`` counts.

        Raises ``DamagedRecord`` for a damaged record, which only ``replace`` overwrites.
        """
        path = _path(record["kind"], record["key"])
        # What is remembered may be older than the record that the put has just met.
        self._known.pop(path, None)
        try:
            published = self.find(record["kind"], record["key"])
        except DamagedRecord:
            if not replace:
                raise
            self._call(self.bucket.put, f"{path}/{RECORD}", data)
            return True
        # If the times are equal, the record there is this artifact's own, from an earlier push.
        if published is None or published["created"] == record["created"]:
            return True
        if not replace:
            return False
        self._call(self.bucket.put, f"{path}/{RECORD}", data)
        # Only now: until it was replaced, the other record named these files.
        if _content_name(published) != _content_name(record):
            for file in self._call(self.bucket.sizes, f"{path}/{_content_name(published)}"):
                self._call(self.bucket.delete, file)
        return True

    # ---- locks ----

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, log: Callable[[str], None]) -> Iterator[Hold]:
        """Hold the stage's lock among the machines that share the bucket; ``log`` gets the current holder."""
        claims = BucketClaims(self.bucket, f"locks/{kind}-{key[:SHORT]}")
        hold = Lock(claims, self.lease).acquire(log, self._retry())
        self._known.pop(_path(kind, key), None)  # the holder before may just have published
        try:
            yield hold
        finally:
            with contextlib.suppress(StoreUnreachable, UserError):  # the lock then passes on when its lease is over
                self._call(hold.release)

    # ---- retries ----

    def _retry(self) -> Retry:
        seconds = min(SECONDS_ONCE_AWAY, self.retry.seconds) if self.is_away else self.retry.seconds
        return Retry(self.address, seconds, self.retry.log)

    def _call(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = self._retry().call(functools.partial(action, *args, **kwargs))
        except StoreUnreachable:
            self.is_away = True
            raise
        self.is_away = False
        return result


def _path(kind: str, key: str) -> str:
    return f"{kind}/{key[:SHORT]}"


def _content_name(record: dict[str, Any]) -> str:
    """Return the name of the folder with an artifact's files: 12 digits of a digest of their digests."""
    return digest({name: entry["sha256"] for name, entry in record["outputs"].items()})[:SHORT]


def _is_record(path: str) -> bool:
    return len(PurePosixPath(path).parts) == 3 and path.endswith(f"/{RECORD}")
