"""Upload of a build to the Hugging Face Hub: the files, the checks, and the commit.

The rows, the card and the ledger are uploaded. Dropped rows and their texts (the preview page, the ledger's examples)
are not, unless asked for, since they may have been dropped because they are private. The same commit deletes shards of
an earlier push, so no reader mixes two builds. huggingface_hub handles the token, which is never printed.
Torch-free.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.data.builds.build_files import LEDGER, SPLITS, count_rows, read_ledger, shards
from align.data.card import CARD, License, mixture_license
from align.errors import StageFailed, UserError

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
RepoKind = Literal["dataset", "model"]
PREVIEW = "preview.html"
UPLOADED_PATTERNS = (
    "train-*-of-*.parquet",
    "test-*-of-*.parquet",
    "dropped-*-of-*.parquet",
    "train.parquet",
    "test.parquet",
    PREVIEW,
)
"""Names of files that a push uploads; such files of an earlier push are replaced or deleted."""


@dataclass(frozen=True)
class Part:
    """One file of an upload: its name in the repository, and its local file or bytes."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


@dataclass(frozen=True)
class Upload:
    """Everything that would be uploaded, of a dataset or of a model."""

    folder: Path
    repo: str
    revision: str | None
    private: bool
    parts: tuple[Part, ...]
    license: License
    rows: dict[str, int] = field(default_factory=dict)
    """Split → rows, of a dataset."""

    @property
    def size(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.size for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return the upload for ``--json``."""
        rows = {"rows": self.rows} if self.rows else {}
        return {
            "repo": self.repo,
            "revision": self.revision or "main",
            "private": self.private,
            **rows,
            "license": list(self.license.names),
            "concerns": list(self.license.concerns),
            "files": [{"name": part.name, "bytes": part.size} for part in self.parts],
        }


def prepare(
    folder: Path, repo: str, revision: str | None = None, private: bool = False, everything: bool = False
) -> Upload:
    """Return the upload of ``folder``, without any network access.

    ``everything`` adds dropped rows, the preview page and the ledger's examples. Raises ``UserError`` for a name that
    the Hub does not take, and for a folder without rows, ledger or card.
    """
    check_repo(repo, "dataset")
    ledger = read_ledger(folder)
    if not (folder / CARD).is_file():
        raise UserError(
            f"{folder}: no {CARD} in it, and a dataset without a card is not pushed; build the recipe again."
        )
    parts = [Part(CARD, folder / CARD), Part(LEDGER, _ledger(folder, ledger, everything))]
    splits = (*SPLITS, "dropped") if everything else SPLITS
    parts += [Part(path.name, path) for split in splits for path in shards(folder, split)]
    if everything and (folder / PREVIEW).is_file():
        parts.append(Part(PREVIEW, folder / PREVIEW))
    license = mixture_license(source.get("license") for source in ledger["sources"])
    rows = {split: count_rows(folder, split) for split in SPLITS}
    return Upload(folder, repo, revision, private, tuple(parts), license, rows)


def _ledger(folder: Path, ledger: dict[str, Any], everything: bool) -> Path | bytes:
    """Return the ledger's file, or its text without examples of dropped rows and without the steps' notes."""
    if everything:
        return folder / LEDGER
    steps = [
        {name: value for name, value in line.items() if name not in ("examples", "notes")} for line in ledger["steps"]
    ]
    return (json.dumps({**ledger, "steps": steps}, indent=2) + "\n").encode()


def push(upload: Upload, api: Any = None) -> dict[str, Any]:
    """Create the repository if there is none, and commit the upload. Return ``url``, ``commit`` and ``deleted``.

    ``api`` is a ``huggingface_hub.HfApi``. Raises ``UserError`` if the Hub refuses (no token, no permission, a
    public repository that should be private) and ``StageFailed`` if it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = api or HfApi(library_name="align")
    with hub_errors(upload.repo):
        # One commit with all additions and deletions: readers see the old build or the new one.
        existing = make_repository(api, upload.repo, "dataset", upload.revision, upload.private)
        deleted = stale_files(existing, [part.name for part in upload.parts])
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in deleted]
        operations += [
            CommitOperationAdd(part.name, part.content if isinstance(part.content, bytes) else str(part.content))
            for part in upload.parts
        ]
        commit = api.create_commit(
            upload.repo, operations, repo_type="dataset", revision=upload.revision, commit_message=_message(upload)
        )
    return {"url": str(commit.commit_url), "commit": str(commit.oid), "deleted": deleted}


def stale_files(existing: Sequence[str], uploaded: Sequence[str]) -> list[str]:
    """Return the files of an earlier push that this one does not replace."""
    earlier = [name for name in existing if any(fnmatch.fnmatchcase(name, pattern) for pattern in UPLOADED_PATTERNS)]
    # Only files that a push could have written: what the owner added by hand stays.
    return sorted(set(earlier) - set(uploaded))


def _message(upload: Upload) -> str:
    return ", ".join(f"{rows:,} {split}" for split, rows in upload.rows.items()) + " rows, built with align"


def check_repo(repo: str, kind: RepoKind) -> None:
    """Raise ``UserError`` for a name that the Hub does not take."""
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(f"'{repo}' is no name of a Hub {kind}; write owner/name, letters, digits, '-', '_' and '.'.")


def make_repository(api: Any, repo: str, kind: RepoKind, revision: str | None, private: bool) -> list[str]:
    """Create repository and branch if there are none, and return the files in it.

    Raises ``UserError`` if the repository is public and should be private.
    """
    # None leaves the choice to the owner's default, which may be private; False would mean public.
    api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
    if private and not getattr(api, f"{kind}_info")(repo).private:
        raise UserError(f"{repo} is there already, and public; make it private on the Hub, or name another.")
    if revision is not None:
        api.create_branch(repo, branch=revision, repo_type=kind, exist_ok=True)
    return list(api.list_repo_files(repo, revision=revision, repo_type=kind))


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Convert the Hub's errors: ``UserError`` if it refuses, ``StageFailed`` if it cannot be reached."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(without_token(f"{repo}: {error}")) from None
    except HfHubHTTPError as error:
        raise hub_error(repo, error) from None
    except (httpx.HTTPError, OSError) as error:
        raise StageFailed(
            without_token(f"{repo}: the Hub cannot be reached: {type(error).__name__}: {error}")
        ) from None


def hub_error(repo: str, error: Any) -> UserError | StageFailed:
    """Return an error of the user if the Hub refuses, or of the stage if the Hub failed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = (getattr(error, "server_message", None) or str(error)).strip().splitlines()
    reason = without_token(lines[0].rstrip(".") if lines else type(error).__name__)
    if status in (401, 403):
        return UserError(
            f"{repo}: the Hub refuses ({status}): {reason}. Set HF_TOKEN to a token that may write there, or run "
            "`hf auth login`."
        )
    if status is not None and status < 500:
        return UserError(f"{repo}: the Hub refuses ({status}): {reason}.")
    return StageFailed(
        f"{repo}: the Hub failed: {reason}. Push again; a push is one commit, so nothing was uploaded in part."
    )


def without_token(text: str) -> str:
    """Return ``text`` without the token, in case an error quotes it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name)
        if token:
            text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", text)
