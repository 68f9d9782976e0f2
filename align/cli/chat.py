"""``align chat``: chat with a checkpoint in the terminal. Replies are streamed; earlier turns stay in the context.

``/reset`` clears the conversation, and ``/exit`` or the end of input leaves. Ctrl-C stops a reply; at the prompt it
leaves. The engine is always transformers, which starts fastest for one reply at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from align.errors import printable

DIM = ("\x1b[2m", "\x1b[0m")
"""Sequences that begin and end dim text in a terminal."""
HELP = "/reset clears the conversation, /exit leaves, Ctrl-C stops a reply."


def chat(
    checkpoint: Path,
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 256,
    *,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
) -> int:
    """Chat with ``checkpoint``, a model folder or an artifact's folder, until the user leaves; return exit code 0.

    Raises ``UserError`` for a folder that holds no policy or a tokenizer without a chat template.
    """
    source = stdin or sys.stdin
    output = stdout or sys.stdout
    folder = checkpoint if (checkpoint / "config.json").is_file() else checkpoint / "model"
    from align.inference.replier import Replier

    replier = Replier(folder, temperature, max_tokens)
    print(f"{folder}\n{HELP}", file=output)
    first_turns = [{"role": "system", "content": system}] if system else []
    turns = first_turns
    while True:
        try:
            text = _read_line(source, output)
        except KeyboardInterrupt:
            text = None
        if text is None or text == "/exit":
            print(file=output)
            return 0
        if text == "/reset":
            turns = first_turns
            print("(cleared)", file=output)
        # A word with a slash is a mistyped command; a sentence that begins with a slash is a message.
        elif text.startswith("/") and " " not in text:
            print(HELP, file=output)
        elif text:
            turns = [*turns, {"role": "user", "content": text}]
            reply = _stream_reply(replier.reply(turns), output)
            turns = [*turns, {"role": "assistant", "content": reply}]


def _read_line(source: TextIO, output: TextIO) -> str | None:
    """Prompt for a line and return it stripped; None at the end of input."""
    output.write("\n> ")
    output.flush()
    line = source.readline()
    return line.strip() if line else None


def _stream_reply(pieces: Iterator[tuple[str, str]], output: TextIO) -> str:
    """Print a reply as it is generated and return it; Ctrl-C ends it early and keeps what was printed.

    A terminal shows thoughts dim.
    """
    dim, reset = DIM if output.isatty() and "NO_COLOR" not in os.environ else ("", "")
    reply = ""
    try:
        for thought, answer in pieces:
            reply += thought + answer
            output.write(f"{dim}{printable(thought)}{reset}" if thought else "")
            output.write(printable(answer))
            output.flush()
    except KeyboardInterrupt:
        output.write(" …")
    print(file=output)
    return reply
