"""A generator of rows that kills its process once, for tests of builds that are killed."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(count: int, folder: str) -> Iterator[dict[str, Any]]:
    """``count`` rows. While ``folder`` has a file ``kill``, the process is killed once its first shard is done."""
    flag = Path(folder, "kill")
    for number in range(count):
        if number == count - 1 and flag.exists():
            while not list(Path(folder).rglob("pass-0/00000.json")):
                time.sleep(0.05)
            flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        yield {"prompt": f"what is {number % 15_000}?", "completion": "yes"}
