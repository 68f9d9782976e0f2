"""Resolve the name of a Hub repository to a commit, and read its small files. Never imports torch.

Online, the Hub is asked. Offline (``HF_HUB_OFFLINE=1``, which ``--offline`` sets), the Hub's cache on this machine
answers. Excluded: downloading weights (``align.stages.model``) and rows (``align.data.sources``).
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

from align.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")
"""A branch, a tag or a commit."""
DEFAULT = "main"
SECONDS = 10.0
PROBE_SECONDS = 3.0
"""Time limits for one answer of the Hub: a required answer, and an answer that only reveals a fault earlier."""

RepoType = Literal["model", "dataset"]


def is_commit(revision: str | None) -> bool:
    """Return True for a commit, 40 hexadecimal digits, which never means anything else later."""
    return revision is not None and COMMIT.fullmatch(revision) is not None


def find_commit(name: str, revision: str | None, repo_type: RepoType) -> str:
    """Return the commit that ``revision`` (a branch or tag; ``main`` if it is None) of a repository means now.

    A commit is returned as it is. Raises ``UserError`` for a repository or revision that does not exist, if the Hub
    cannot be reached, and offline for a revision that is not in the cache.
    """
    if revision is not None and is_commit(revision):
        return revision
    if revision is not None and not REVISION.fullmatch(revision):
        raise UserError(f"revision: '{revision}' is not a branch, tag or commit.")
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        cached = cached_commit(name, revision, repo_type)
        if cached is None:
            options = " --repo-type dataset" if repo_type == "dataset" else ""
            options += f" --revision {revision}" if revision else ""
            raise UserError(
                f"the Hub {repo_type} '{name}'{_at(revision)} is not in the Hub's cache, and --offline "
                "(HF_HUB_OFFLINE=1) reads nothing else. Fetch it where there is a network: "
                f"`hf download {name}{options}`."
            )
        return cached
    return _current_commit(name, revision or DEFAULT, repo_type)


@lru_cache(maxsize=256)
def _current_commit(name: str, revision: str, repo_type: RepoType) -> str:
    """Ask the Hub, once per process: every loading of a pipeline then means the same commit."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    api = huggingface_hub.HfApi()
    describe = api.dataset_info if repo_type == "dataset" else api.model_info
    label = f"the Hub {repo_type} '{name}'"
    try:
        commit = describe(name, revision=revision, timeout=SECONDS).sha
    except GatedRepoError:
        raise UserError(f"{label} is gated: accept its terms on its page, and set HF_TOKEN.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{label} does not exist, or it is private; check its name, and set HF_TOKEN for a private one."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"revision: {label} has no branch, tag or commit '{revision}'.") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(_explain_unreachable(label, name, revision, repo_type, error)) from None
    if not is_commit(commit):
        raise UserError(f"{label}: the Hub names no commit for '{revision}'. Write the commit as revision.")
    return str(commit)


def _explain_unreachable(label: str, name: str, revision: str, repo_type: RepoType, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    cached = cached_commit(name, revision, repo_type)
    if cached is not None:
        remedy = f"--offline takes the commit in the Hub's cache, {cached}."
    else:
        remedy = "Check the network and HF_ENDPOINT, or write the commit as revision."
    return f"{label}: the Hub could not be asked for its commit ({reason}). {remedy}"


def cached_commit(name: str, revision: str | None, repo_type: RepoType) -> str | None:
    """Return the commit of a repository in the Hub's cache: the commit of ``revision``, else the default's newest.

    A download by commit leaves no name of its branch in the cache. A ``revision`` must be in the cache by name.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)
    reference = folder / "refs" / (revision or DEFAULT)
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
        if is_commit(commit) and (folder / "snapshots" / commit).is_dir():
            return commit
    if revision not in (None, DEFAULT) or not (folder / "snapshots").is_dir():
        return None
    commits = [path for path in (folder / "snapshots").iterdir() if is_commit(path.name)]
    snapshots = [path for path in commits if path.is_dir()]
    return max(snapshots, key=lambda path: (os.stat(path).st_mtime_ns, path.name)).name if snapshots else None


def small_file(name: str, commit: str, file: str, repo_type: RepoType = "model") -> Path | None:
    """Return a file of a repository at a commit, from the cache or fetched into it; None if there is no such file.

    Also returns None if the Hub does not answer, because such files only reveal a fault earlier.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    cached = huggingface_hub.try_to_load_from_cache(name, file, revision=commit, repo_type=repo_type)
    if isinstance(cached, str):
        return Path(cached)
    # Anything but None is the cache's note that the repository has no such file.
    if cached is not None or not _is_answering(name, commit, repo_type):
        return None
    with contextlib.suppress(EntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError):
        return Path(huggingface_hub.hf_hub_download(name, file, revision=commit, repo_type=repo_type))
    return None


@lru_cache(maxsize=256)
def _is_answering(name: str, commit: str, repo_type: RepoType) -> bool:
    """Return True if the Hub has a repository at a commit. A download would try for half a minute to find out."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.is_offline_mode():
        return False
    api = huggingface_hub.HfApi()
    describe = api.dataset_info if repo_type == "dataset" else api.model_info
    try:
        describe(name, revision=commit, timeout=PROBE_SECONDS)
    except (HfHubHTTPError, httpx.HTTPError, OSError):
        return False
    return True


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
