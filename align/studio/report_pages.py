"""The report pages of runs at ``/reports/RUN/...``, as their files are in the store.

A page has inline styles and one script, whose hash its own content security policy names. The studio repeats that
policy as a header and adds a sandbox: the page has no origin, so its script reaches neither the API nor the cookie. The
page of a running run reloads itself; its address has a ticket for that, because a sandbox sends no cookie.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from align.errors import StageFailed
from align.runs.run_page import PAGE
from align.store.store import REPORTS
from align.studio.context import NotFound, StudioContext, checked_name
from align.studio.security import report_ticket

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
    ".csv": "text/csv; charset=utf-8",
    ".json": "application/json",
}
SCRIPT_HASH = re.compile(rb"script-src ('sha256-[A-Za-z0-9+/]{43}=')")
SECONDS_TO_WRITE = 600.0
HEAD_BYTES = 2048
"""Bytes at the beginning of a page that contain its policy."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; {}img-src data:; base-uri 'none'; form-action 'none'; "
SANDBOX = "frame-ancestors 'none'; sandbox allow-scripts"


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the pages, which are not below ``/api``."""
    router = APIRouter()

    @router.get("/reports/{run}/{path:path}")
    def report(run: str, path: str) -> FileResponse:
        parts = path.split("/")
        file = context.inside(REPORTS, checked_name("run", run), *parts)
        media_type = MEDIA_TYPES.get(file.suffix)
        if media_type is None or not file.is_file():
            raise NotFound(f"The run '{run}' has no such file. `align report {run}` writes its page.")
        return FileResponse(file, media_type=media_type, headers={"content-security-policy": page_policy(file)})

    return router


def page_policy(file: Path) -> str:
    """Return the content security policy of a file: no script but the one of the page's own hash."""
    script = b""
    if file.name == PAGE:
        with file.open("rb") as page:
            match = SCRIPT_HASH.search(page.read(HEAD_BYTES))
        script = b"" if match is None else match[1]
    return POLICY.format(f"script-src {script.decode()}; " if script else "") + SANDBOX


def write_report_page(context: StudioContext, run: str) -> str:
    """Write the page of a run as ``align report`` does, in a process that loads matplotlib; return its address.

    Raises ``StageFailed`` with the command's message if it writes none.
    """
    context.require_writable()
    command = [sys.executable, "-m", "align.cli.main", "report", checked_name("run", run), "--json", "--store"]
    try:
        process = subprocess.run(
            [*command, context.opening.folder], capture_output=True, text=True, timeout=SECONDS_TO_WRITE
        )
    except subprocess.TimeoutExpired:
        raise StageFailed(f"{run}: the page was not written within {SECONDS_TO_WRITE:.0f} s.") from None
    if process.returncode:
        raise StageFailed(process.stderr.strip() or f"`align report {run}` ended with {process.returncode}.")
    return page_address(context, run)


def page_address(context: StudioContext, run: str) -> str:
    """Return the address of a run's page; empty if it has none yet."""
    page = context.store.root / REPORTS / run / PAGE
    return f"/reports/{run}/{PAGE}?ticket={report_ticket(context.secret, run)}" if page.is_file() else ""
