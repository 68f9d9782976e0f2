"""``align report --watch``: write a run's page repeatedly until the run ends; the page reloads itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align.cli.run_page import RunOutline, find_failure, finished_artifacts, write_page
from align.cli.status import live_jobs
from align.store.store import Store

QUIET_SECONDS = 30.0
"""A run of which no stage runs for so long has ended: between two stages there are seconds."""
REPORT_KIND = "report"
SHARE_OF_TIME = 0.2
"""Largest share of the time that goes into writing pages: the run needs the processors."""


@dataclass
class Watch:
    """A run that is watched: its store, the folder of its page (None: in the store), and seconds between pages."""

    outline: RunOutline
    store: Store
    folder: Path | None
    every: float
    sleep: Callable[[float], None] = time.sleep

    def follow(self, show: Callable[[Path], None]) -> Path | None:
        """Write the page until the run has ended, and once more without the reload; return it, None without a page.

        ``show`` is called with the page after the first time. Ctrl-C also ends it.
        """
        page = None
        last_active = time.monotonic()
        try:
            while True:
                is_active = self._is_active()
                now = time.monotonic()
                last_active = now if is_active else last_active
                if self._is_done() or (self._has_content() and now - last_active > QUIET_SECONDS):
                    break
                spent = 0.0
                if self._has_content():
                    is_first = page is None
                    page = self._write(refresh=max(1, round(self.every)))
                    spent = time.monotonic() - now
                    if is_first:
                        show(page)
                # Reading a large run is slower, so it is read less often.
                self.sleep(max(self.every, spent / SHARE_OF_TIME))
        except KeyboardInterrupt:
            # The page of before would reload itself for ever.
            return self._write() if page is not None else None
        is_first = page is None
        page = self._write()
        if is_first:
            show(page)
        return page

    def _write(self, refresh: int | None = None) -> Path:
        failure = find_failure(self.outline, self.store)
        return write_page(self.outline, self.store, failure, self.folder, always=False, refresh=refresh)

    def _is_active(self) -> bool:
        """Return True while a stage runs, here or elsewhere, or a job of the run waits in a queue."""
        if any(self.store.is_locked(kind, key) for kind, key in self.outline.stages.values()):
            return True
        jobs, slurm_error = live_jobs(self.store, [self.outline])
        # A scheduler that does not answer may still have jobs of the run.
        return bool(jobs) or bool(slurm_error)

    def _is_done(self) -> bool:
        """Return True once every stage but the report has its artifact and none is made again."""
        finished = finished_artifacts(self.outline, self.store)
        stages = [name for name, (kind, _) in self.outline.stages.items() if kind != REPORT_KIND]
        return all(name in finished for name in stages) and not self._is_active()

    def _has_content(self) -> bool:
        """Return True if a stage has begun, which gives the page content."""
        has_begun = find_failure(self.outline, self.store) is not None
        return has_begun or bool(finished_artifacts(self.outline, self.store))
