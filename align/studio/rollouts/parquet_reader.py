"""Reads Parquet files with DuckDB, which may open files of one folder and nothing else.

The database is in memory and has no network: extensions are neither installed nor loaded, external access is limited to
the folder, and the settings are locked. Values reach a statement as parameters only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from align.errors import UserError, missing_extra
from align.store.rollouts import checked_files, read_located

if TYPE_CHECKING:
    import duckdb

Result = TypeVar("Result")

MEMORY, THREADS = "512MB", 2
"""Memory that the queries of all requests share, and threads."""
MAX_QUERIES = 2
"""Queries that run at the same time; further ones wait."""
SECONDS = 60.0
"""Time limit of a query, and of waiting for its turn."""
CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
    "memory_limit": MEMORY,
    "threads": THREADS,
}
"""Settings from the beginning; ``_LOCKED`` follows."""
_LOCKED = (
    # Nothing is written to a disk: a query that needs more memory fails.
    "SET GLOBAL temp_directory = ''",
    # The footers of files are read once.
    "SET GLOBAL parquet_metadata_cache = true",
    "SET GLOBAL enable_external_access = false",
    "SET GLOBAL lock_configuration = true",
)

Rows = list[dict[str, Any]]


class ParquetReader:
    """Runs queries over the Parquet files below ``root``; requests may use it from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._database = _open_database(root)
        self._slots = threading.BoundedSemaphore(MAX_QUERIES)

    def rows(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any]) -> Rows:
        """Return the rows of a statement as dictionaries; ``parameters`` are bound."""
        if not self._slots.acquire(timeout=SECONDS):
            raise UserError(f"{self.root}: other queries take longer than {SECONDS:g} s. Ask again, for fewer rows.")
        try:
            # A cursor is a separate connection. DuckDB needs one in each thread.
            cursor = self._database.cursor()
            limit = threading.Timer(SECONDS, cursor.interrupt)
            limit.daemon = True
            limit.start()
            try:
                cursor.execute(sql, parameters)
                names = [column[0] for column in cursor.description or ()]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
            finally:
                limit.cancel()
                cursor.close()
        finally:
            self._slots.release()

    def read(self, locate: Callable[[], Path], query: Callable[[list[Path]], Result]) -> Result:
        """Return the result of ``query`` for the checked files of a folder, which ``locate`` returns.

        Raises ``UserError`` for files that cannot be read or are not what the stage wrote.
        """
        import duckdb

        def read_folder(folder: Path) -> Result:
            try:
                return query(checked_files(folder))
            except (duckdb.Error, OSError) as error:
                raise UserError(f"{folder}: stored rollouts cannot be read: {error}") from error

        return read_located(locate, read_folder)

    def close(self) -> None:
        """Free the memory."""
        self._database.close()


def _open_database(root: Path) -> duckdb.DuckDBPyConnection:
    try:
        import duckdb
    except ImportError:
        raise missing_extra("duckdb", "studio", "align studio") from None
    database = duckdb.connect(":memory:", config=CONFIG)
    database.execute("SET GLOBAL allowed_directories = ?", [[f"{root}/"]])
    for statement in _LOCKED:
        database.execute(statement)
    return database
