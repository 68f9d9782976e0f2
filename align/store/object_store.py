"""A prefix in a bucket of an object store (S3 and what speaks it, GCS, Azure), by obstore. The only file that knows it.

Every put is whole or not at all, and is seen by everybody at once. Credentials come from the store's own environment
variables or the machine's role, never from an address. What is kept where is ``remote.py``'s. Knows no torch.
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
"""Bytes of a part of an upload, and of one request of a download."""
AT_ONCE = 4
TRIES, TRY_SECONDS = 3, 30
"""What obstore itself repeats within a call; longer patience is the caller's."""
TOO_BUSY = (408, 425, 429)
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


def check_address(address: str) -> str:
    """The address without a last slash; ``ValueError``, which repeats nothing secret, for one that will not do."""
    parts = urlsplit(address)
    if parts.username or parts.password or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "an address must not carry keys, tokens or queries; credentials come from the environment "
            f"({CREDENTIALS['s3']})."
        )
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise ValueError(f"should be like s3://bucket/prefix, with one of {', '.join(SCHEMES)}.")
    return address.rstrip("/")


class Bucket:
    """Objects below an address such as ``s3://bucket/prefix``.

    Calls raise ``OSError`` where the other side does not answer (they may be repeated), and ``UserError`` where it
    refuses: no such bucket, no rights, no credentials.
    """

    def __init__(self, address: str) -> None:
        self.address = check_address(address)
        self._opened: Any = None

    def get(self, path: str) -> bytes | None:
        """An object's bytes, or None."""
        found: bytes | None = self._call(
            path, lambda obstore, store: bytes(obstore.get(store, path).bytes()), missing=None
        )
        return found

    def get_range(self, path: str, start: int, length: int) -> bytes | None:
        """Some bytes of an object, fewer at its end; None where there is no such object."""
        found: bytes | None = self._call(
            path, lambda obstore, store: bytes(obstore.get_range(store, path, start=start, length=length)), missing=None
        )
        return found

    def put(self, path: str, data: bytes) -> None:
        """Make or replace an object."""
        self._call(path, lambda obstore, store: obstore.put(store, path, data, use_multipart=False))

    def put_new(self, path: str, data: bytes) -> bool:
        """Make an object where none is; False where there is one. Of many askers one alone gets True."""

        def put(obstore: Any, store: Any) -> bool:
            try:
                obstore.put(store, path, data, mode="create", use_multipart=False)
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                # A repeated request meets what the first one made, whose answer was lost.
                return bytes(obstore.get(store, path).bytes()) == data
            return True

        return bool(self._call(path, put))

    def upload(self, path: str, file: Path) -> None:
        """Make or replace an object from a file, in parts; none of it is there before all of it is."""
        self._call(
            path, lambda obstore, store: obstore.put(store, path, file, chunk_size=CHUNK, max_concurrency=AT_ONCE)
        )

    def sizes(self, prefix: str) -> dict[str, int]:
        """Objects below ``prefix`` and their bytes."""

        def listed(obstore: Any, store: Any) -> dict[str, int]:
            return {one["path"]: one["size"] for some in obstore.list(store, prefix) for one in some}

        return dict(self._call(prefix, listed, missing={}))

    def delete(self, path: str) -> None:
        """Delete an object, if it is there."""
        self._call(path, lambda obstore, store: obstore.delete(store, path), missing=None)

    def _call(self, path: str, action: Any, **missing: Any) -> Any:
        try:
            import obstore
        except ImportError:
            raise UserError(
                f"{self.address}: object stores need obstore, which is not installed: pip install 'align[s3]'."
            ) from None
        try:
            if self._opened is None:
                self._opened = _open(self.address)
            return action(obstore, self._opened)
        except FileNotFoundError as error:
            if "missing" in missing and "NoSuchBucket" not in str(error):
                return missing["missing"]
            raise UserError(f"{self.address}: there is no such bucket, or none that these credentials see.") from None
        except (obstore.exceptions.BaseError, obstore.exceptions.GenericError, ValueError) as error:
            raise self._explain(error, path) from None

    def _explain(self, error: Exception, path: str) -> Exception:
        """What an error of obstore is to a user. Its first line names the request, never a key."""
        text = str(error).splitlines()[0].partition(": <?xml")[0].strip()
        status = re.search(r"status code: (\d{3})", text)
        code = int(status[1]) if status else 0
        scheme = urlsplit(self.address).scheme
        names = CREDENTIALS.get(scheme, "those of its own client")
        if "169.254." in text or "metadata.google" in text:
            return UserError(f"{self.address}: no credentials were found. Set {names}.")
        if "NoSuchBucket" in str(error):
            return UserError(f"{self.address}: there is no such bucket.")
        if code in (401, 403) or "privileges" in text or "Unauthenticated" in type(error).__name__:
            return UserError(f"{self.address}/{path}: access was refused ({code or text}). Look at {names}.")
        if 400 <= code < 500 and code not in TOO_BUSY:
            return UserError(f"{self.address}/{path}: {text}")
        return OSError(errno.EHOSTUNREACH, text)


def _open(address: str) -> Any:
    from obstore.store import from_url

    return from_url(
        address,  # type: ignore[arg-type]
        client_options={"allow_http": True, "timeout": "300s", "connect_timeout": "10s"},
        retry_config={"max_retries": TRIES, "retry_timeout": datetime.timedelta(seconds=TRY_SECONDS)},
    )
