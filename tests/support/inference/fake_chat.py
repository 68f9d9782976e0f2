"""A stand-in for an OpenAI-compatible server, in a thread: it answers from a function and counts what it is asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any] | bytes | tuple[int, Any] | tuple[int, Any, dict[str, str]]


def completion(text: str | None, **changed: Any) -> dict[str, Any]:
    """A chat completion; ``finish_reason``, ``usage`` and ``refusal`` may be given."""
    usage = {"prompt_tokens": 10, "completion_tokens": len((text or "").split())}
    message = {"role": "assistant", "content": text, "refusal": changed.get("refusal")}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": changed.get("finish_reason", "stop")}],
        "usage": changed.get("usage", usage),
    }


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Says which prompt and seed it was given."""
    return completion(f"{body['messages'][-1]['content']} / {body.get('seed')}")


class FakeChat:
    """Listens on a port, by default a free one.

    ``reply(body)`` gives JSON, bytes, or (status, content[, headers]) of each completion.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply] = echo, delay: float = 0, port: int = 0) -> None:
        self.reply, self.delay = reply, delay
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.models = ["good-model"]
        self.card: dict[str, str] = {}
        self.under_way = self.most_under_way = 0
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and let hanging calls go."""
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

    def hang(self, body: dict[str, Any]) -> Reply:
        """Answer nothing until the server stops."""
        self.stopped.wait()
        raise ConnectionError

    def refuse(self, body: dict[str, Any]) -> Reply:
        """Close the connection without an answer."""
        raise ConnectionError

    def prompts(self) -> list[str]:
        """Last message of every request, in the order of arrival."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": name, **fake.card} for name in fake.models]}, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path not in ("/v1/chat/completions", "/v1/completions"):
                    return self._send(404, {"error": {"message": f"no route {self.path}"}}, {})
                with fake.lock:
                    fake.bodies.append(body)
                    fake.headers.append(dict(self.headers))
                    fake.times.append(time.monotonic())
                    fake.under_way += 1
                    fake.most_under_way = max(fake.most_under_way, fake.under_way)
                try:
                    time.sleep(fake.delay)
                    reply = fake.reply(body)
                except ConnectionError:
                    self.close_connection = True
                    return None
                finally:
                    with fake.lock:
                        fake.under_way -= 1
                status, content, *more = reply if isinstance(reply, tuple) else (200, reply)
                return self._send(status, content, more[0] if more else {})

            def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        return Handler
