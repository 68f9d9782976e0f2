"""Replies of a real model: streamed pieces are the whole reply, and long conversations fit into the context."""

from __future__ import annotations

from pathlib import Path

from align.inference.replier import Replier


def test_a_real_model_streams_what_it_would_say_at_once(tiny_model: Path) -> None:
    replier = Replier(tiny_model, temperature=0, max_tokens=12)
    pieces = list(replier.reply([{"role": "user", "content": "Hi"}]))
    assert "".join(pieces) == "".join(replier.reply([{"role": "user", "content": "Hi"}]))
    long = [{"role": "user", "content": "x" * 900}, {"role": "assistant", "content": "y" * 900}]
    ids = replier._prompt_ids([{"role": "system", "content": "S"}, *long, {"role": "user", "content": "z" * 900}])
    assert ids.shape[1] < 1000
    assert "S" in replier.tokenizer.decode(ids[0])
