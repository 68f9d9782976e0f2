"""Run as ``python preloaded_python.py ADDRESS COUNT DESCRIPTOR... ARGUMENT...``, this is ``python ARGUMENT...``.

The process is a fork of the server at ADDRESS (``tests/support/preloaded_server.py``), which has imported the
libraries. It gets this one's streams, folder and environment, and the COUNT descriptors named. This process ends as it
does. Where the server has ended, this process becomes the interpreter itself.
"""

# A bare interpreter runs this file, in 15 ms: nothing more is imported than it needs.
import json
import os
import signal
import socket
import sys


def main(address: str, descriptors: list[int], arguments: list[str]) -> int:
    """Have the server run ``arguments`` and return the exit code; without a server, become the interpreter."""
    order = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "descriptors": descriptors,
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [json.dumps(order).encode()], descriptors)
            is_started = bool(connection.recv(64))
        except OSError:
            is_started = False
        if not is_started:
            os.execv(sys.executable, [sys.executable, *arguments])
        # Only the fork holds them now, so that their other ends see when it closes them.
        for descriptor in descriptors:
            os.close(descriptor)
        answer = connection.recv(64)
    # No answer: the server was killed, and its forks with it.
    code = int(answer) if answer else -signal.SIGKILL
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    first, count = 3, int(sys.argv[2])
    inherited = [int(word) for word in sys.argv[first : first + count]]
    sys.exit(main(sys.argv[1], [0, 1, 2, *inherited], sys.argv[first + count :]))
