"""``python -m tests.support.flaky_mount FOLDER PLACE``: FOLDER shown at PLACE by FUSE, away while FOLDER.away exists.

While it is away every call fails with an error of a network file system that lost its server.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import mfusepy as fuse


class Flaky(fuse.Operations):
    """Passes calls on to a folder, or says that its server is away."""

    use_ns = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.away = str(folder), f"{folder}.away"

    def _at(self, path: str) -> str:
        if os.path.exists(self.away):
            raise fuse.FuseOSError(errno.ESTALE)
        return self.folder + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        stat = os.lstat(self._at(path))
        times = {name: getattr(stat, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        plain = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
        return {**times, **{name: getattr(stat, name) for name in plain}}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    def access(self, path: str, amode: int) -> int:
        self._at(path)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._at(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._at(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._at(path))
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        os.rename(self._at(old), self._at(new))
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._at(source), self._at(target))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._at(path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self._at(path), ns=times)
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._at(path), length)
        return 0

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._at(path)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._at(path)
        return os.pwrite(fh, data, offset)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._at(path)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._at(path)
        return 0

    def flush(self, path: str, fh: int) -> int:
        self._at(path)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        stat = os.statvfs(self.folder)
        names = (
            "f_bavail",
            "f_bfree",
            "f_blocks",
            "f_bsize",
            "f_favail",
            "f_ffree",
            "f_files",
            "f_frsize",
            "f_namemax",
        )
        return {name: getattr(stat, name) for name in names}


if __name__ == "__main__":
    fuse.FUSE(Flaky(Path(sys.argv[1])), sys.argv[2], foreground=True, nothreads=False, attr_timeout=0, entry_timeout=0)
