"""A prefix in a bucket of an object store (S3 and compatible stores, GCS, Azure). The only file that uses obstore.

Every put is atomic and visible to everybody at once. Credentials come from the environment variables of the object
store or from the machine's role, never from an address. The layout of a bucket is ``remote.py``'s. Knows no torch.
"""

from __future__ import annotations

import datetime
import errno
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from align.errors import UserError

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
CHUNK = 32 << 20
"""Bytes of one part of an upload, and of one request of a download."""
MAX_CONCURRENCY = 4
TRIES = 3
TRY_SECONDS = 30
"""Retries of obstore within a call; longer ones are the caller's."""
RETRIED_STATUSES = (408, 425, 429)
WRONG_SETTINGS = ("InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError", "ValueError")
"""Errors that no repetition helps."""
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


def check_address(address: str) -> str:
    """Return the address without a last slash. Raises ``ValueError``, which repeats nothing secret."""
    parts = urlsplit(address)
    if parts.username or parts.password or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "an address must not carry keys, tokens or queries; credentials come from the environment "
            f"({CREDENTIALS['s3']})."
        )
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise ValueError(f"should be like s3://bucket/prefix, with one of {', '.join(SCHEMES)}.")
    return address.rstrip("/")


class AccessRefused(UserError):
    """The object store answers and refuses: no such bucket, no rights, no credentials, or none that are still valid."""


class Bucket:
    """Objects below an address such as ``s3://bucket/prefix``.

    Calls raise ``OSError`` if the other side does not answer (they may be repeated), and ``AccessRefused`` if it
    refuses.
    """

    def __init__(self, address: str) -> None:
        self.address = check_address(address)
        self._opened: Any = None

    def get(self, path: str) -> bytes | None:
        """Return an object's bytes, or None."""
        data: bytes | None = self._call(
            path, lambda obstore, store: bytes(obstore.get(store, path).bytes()), missing=None
        )
        return data

    def get_range(self, path: str, start: int, length: int) -> bytes | None:
        """Return some bytes of an object, fewer at its end; None if there is no such object."""
        data: bytes | None = self._call(
            path, lambda obstore, store: bytes(obstore.get_range(store, path, start=start, length=length)), missing=None
        )
        return data

    def put(self, path: str, data: bytes) -> None:
        """Create or replace an object."""
        self._call(path, lambda obstore, store: obstore.put(store, path, data, use_multipart=False))

    def put_new(self, path: str, data: bytes) -> bool:
        """Create an object; returns False if there is one. Of several processes only one gets True."""

        def put(obstore: Any, store: Any) -> bool:
            try:
                obstore.put(store, path, data, mode="create", use_multipart=False)
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                # A repeated request finds what the first request created, if its answer was lost.
                return bytes(obstore.get(store, path).bytes()) == data
            return True

        return bool(self._call(path, put))

    def upload(self, path: str, file: Path) -> None:
        """Create or replace an object from a file, in parts; it becomes visible when all of it is there."""

        def put(obstore: Any, store: Any) -> None:
            obstore.put(store, path, file, chunk_size=CHUNK, max_concurrency=MAX_CONCURRENCY)

        self._call(path, put)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return path → size in bytes of the objects below ``prefix``."""

        def list_sizes(obstore: Any, store: Any) -> dict[str, int]:
            sizes = {}
            for page in obstore.list(store, prefix):
                for entry in page:
                    sizes[entry["path"]] = entry["size"]
            return sizes

        return dict(self._call(prefix, list_sizes, missing={}))

    def delete(self, path: str) -> None:
        """Delete an object if it exists."""
        self._call(path, lambda obstore, store: obstore.delete(store, path), missing=None)

    def _call(self, path: str, action: Any, **default: Any) -> Any:
        """Run ``action(obstore, store)``. ``missing=VALUE`` is returned if there is no such object."""
        try:
            import obstore
        except ImportError:
            raise UserError(
                f"{self.address}: object stores need obstore, which is not installed: pip install 'align-pipeline[s3]'."
            ) from None
        try:
            if self._opened is None:
                self._opened = _open(self.address)
            return action(obstore, self._opened)
        except FileNotFoundError as error:
            # A missing object and a missing bucket are the same error; only the text tells them apart.
            if "missing" in default and "NoSuchBucket" not in str(error):
                return default["missing"]
            raise AccessRefused(
                f"{self.address}: there is no such bucket, or none that these credentials see."
            ) from None
        except (obstore.exceptions.BaseError, obstore.exceptions.GenericError, ValueError) as error:
            raise self._explain(error, path) from None

    def _explain(self, error: Exception, path: str) -> Exception:
        """Return the ``AccessRefused`` or ``OSError`` for an error of obstore. Its first line names no key."""
        text = str(error).splitlines()[0].partition(": <?xml")[0].strip()
        # obstore has no error class per status, so the text is read.
        status = re.search(r"status code: (\d{3})", text)
        code = int(status[1]) if status else 0
        scheme = urlsplit(self.address).scheme
        names = CREDENTIALS.get(scheme, "those of its own client")
        # The last resort of the credential chain is the cloud's metadata service, which is not there.
        if "169.254." in text or "metadata.google" in text:
            return AccessRefused(f"{self.address}: no credentials were found. Set {names}.")
        if "NoSuchBucket" in str(error):
            return AccessRefused(f"{self.address}: there is no such bucket.")
        if code in (401, 403) or "privileges" in text or "Unauthenticated" in type(error).__name__:
            return AccessRefused(f"{self.address}/{path}: access was refused ({code or text}). Look at {names}.")
        if 400 <= code < 500 and code not in RETRIED_STATUSES:
            return AccessRefused(f"{self.address}/{path}: {text}")
        if type(error).__name__ in WRONG_SETTINGS:
            return AccessRefused(f"{self.address}: {text}")
        # All else may pass, such as a server that is overloaded or away: callers repeat it.
        return OSError(errno.EHOSTUNREACH, text)


def _open(address: str) -> Any:
    from obstore.store import from_url

    return from_url(
        address,  # type: ignore[arg-type]
        client_options={"allow_http": True, "timeout": "300s", "connect_timeout": "10s"},
        retry_config={"max_retries": TRIES, "retry_timeout": datetime.timedelta(seconds=TRY_SECONDS)},
    )
