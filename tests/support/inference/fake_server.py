"""A stand-in for vLLM's server, with its routes and none of its weight: in a thread, or as a process of its own.

``python fake_server.py --uds PATH [what vLLM takes]`` answers as a healthy server would; with ``$FAKE_SERVER=hang`` it
answers no completion, with ``cling`` a child that does not listen to SIGTERM keeps the connections open as well, with
``mute`` it does not even listen, with ``refuse`` it ends at once. It refuses calls without its key, as guarded ones do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from align.inference.server_guard import Guard
from align.inference.server_worker import LOAD, NAME, REPORT, WORKER

EOS = 2


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer: ``max_tokens`` tokens that follow from the seed; with an odd one, the last ends the turn."""
    seed, count = body.get("seed", 0), body["max_tokens"]
    tokens = [10 + (seed + place) % 200 for place in range(count)]
    if seed % 2:
        tokens[-1] = EOS
    scored = [None, *({str(token): {"logprob": -float(token), "rank": 1}} for token in body["prompt"][1:])]
    return {
        "choices": [
            {
                "text": "",
                "token_ids": tokens,
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": [-token / 100 for token in tokens]},
                "finish_reason": "stop" if seed % 2 else "length",
                "prompt_logprobs": scored if "prompt_logprobs" in body else None,
            }
        ]
    }


def info(**changed: Any) -> dict[str, Any]:
    """What ``/server_info`` says of a fit server; ``changed`` replaces fields of its model's configuration."""
    model = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
    return {
        "vllm_config": {
            "model_config": model | {"max_model_len": 128} | changed,
            "scheduler_config": {"enable_chunked_prefill": False},
            "device_config": {"device": "cpu"},
            "parallel_config": {"worker_extension_cls": WORKER},
        }
    }


class _UnixServer(ThreadingHTTPServer):
    """Listens at a path."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)  # the parent's looks for a port

    def get_request(self) -> Any:
        connection, _ = self.socket.accept()
        return connection, ("local", 0)


class FakeServer:
    """Answers on ``address`` until ``stop``. ``answers[path]`` is a function of the request's body.

    A function returns what is sent as JSON, bytes to send as they are, or a pair of status and content, where the
    status may also be ``halved`` (the connection ends early) or ``trickled`` (a byte every 50 ms).
    """

    def __init__(self, path: str | None = None) -> None:
        """Listen at a free port of 127.0.0.1, or at a Unix socket."""
        self.guard = Guard(None)  # type: ignore[arg-type]  # its key is the environment's
        self.holding: dict[str, Any] = {"version": None, "digest": None, "loads": 0, "content": "the checkpoint's"}
        """What its worker tells of its weights."""
        self.refused: list[tuple[str, int]] = []
        self.calls: list[tuple[str, Any]] = []
        self.under_way = self.most_under_way = 0
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.answers: dict[str, Callable[[Any], Any]] = {
            "/health": lambda body: b"",
            "/server_info": lambda body: info(),
            "/v1/completions": completion,
            "/collective_rpc": self.rpc,
            "/reset_prefix_cache": lambda body: {"success": True},
        }
        if path is None:
            self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
            self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        else:
            self.http = _UnixServer(path, self._handler())  # type: ignore[arg-type]
            self.address = f"unix:{path}"
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # callers that give up are the point
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Refuse connections from now on, and let every hanging call go."""
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

    def paths(self) -> list[str]:
        """The routes that were called, in order, without the questions of health and of the weights that are held."""
        return [path for path, body in self.calls if path != "/health" and not _asks_for_weights(body)]

    def rpc(self, body: Any) -> Any:
        """What ``WeightsKeeper`` does in a real server's worker; ``reload_weights`` is what anybody may call there."""
        words, method = body.get("kwargs") or {}, body["method"]
        if method in (LOAD, "reload_weights"):
            path = words.get("path") or words["weights_path"]
            self.load(path, *([words["base"]] if words.get("base") else []))
            self.holding["loads"] += 1
            self.holding["content"] = f"of {path}"
        if method in (LOAD, NAME):
            self.holding |= {"version": words["version"], "digest": words.get("digest")}
        if method == "reload_weights":
            return {"results": [None]}
        message = dict(self.holding)
        if method not in (LOAD, NAME) and not words.get("content"):
            del message["content"]
        return {"results": [message]}

    def load(self, path: str, base: str = "") -> None:
        """Read weights, or an adapter of the weights in ``base``; there is no model here."""

    def hang(self, body: Any) -> Any:
        """Answer nothing until the server stops."""
        self.stopped.wait()
        raise ConnectionError

    def cling(self, body: Any) -> Any:
        """Hang, and leave a child behind that has inherited every connection."""
        if os.fork() == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(30)
            os._exit(0)
        return self.hang(body)

    def drop(self, body: Any) -> Any:
        """Close the connection without an answer."""
        raise ConnectionError

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                path = self.path.partition("?")[0]
                headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
                refusal = fake.guard.refusal(headers)
                if refusal is not None:
                    fake.refused.append((path, refusal[0]))
                    self.close_connection = True
                    return self._send((refusal[0], {"error": refusal[1]}))
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                with fake.lock:
                    fake.calls.append((path, body))
                    fake.under_way += path == "/v1/completions"
                    fake.most_under_way = max(fake.most_under_way, fake.under_way)
                try:
                    self._send(self._made(path, body))
                except ConnectionError:
                    self.close_connection = True

            def _made(self, path: str, body: Any) -> Any:
                try:
                    return fake.answers[path](body) if path in fake.answers else (404, {"detail": "Not Found"})
                finally:  # before it is sent: whoever gets it may ask again at once
                    with fake.lock:
                        fake.under_way -= path == "/v1/completions"

            def _send(self, answer: Any) -> None:
                status, content = answer if isinstance(answer, tuple) else (200, answer)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status if isinstance(status, int) else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if status == "halved":
                    self.wfile.write(data[: len(data) // 2])
                    raise ConnectionError
                if status == "trickled":
                    for place in range(len(data)):
                        self.wfile.write(data[place : place + 1])
                        time.sleep(0.05)
                    return
                self.wfile.write(data)

        return Handler


def _asks_for_weights(body: Any) -> bool:
    return isinstance(body, dict) and body.get("method") in (REPORT, NAME)


if __name__ == "__main__":
    if os.environ.get("FAKE_SERVER") == "refuse":
        sys.exit("no room for the cache")
    if os.environ.get("FAKE_SERVER") == "mute":
        time.sleep(60)
    server = FakeServer(sys.argv[sys.argv.index("--uds") + 1])
    if os.environ.get("FAKE_SERVER") in ("hang", "cling"):
        server.answers["/v1/completions"] = getattr(server, os.environ["FAKE_SERVER"])
    server.stopped.wait()
