"""Token ids of a growing conversation: its prompt, and the template's tokens between two turns of the policy.

Sampled ids do not change; only the template's new tokens are added after them. So a template must be prefix-preserving:
rendering more messages must not change the tokens before them. Another template is replaced by a training template of
its family, or refused. ``align/data/tool_calls.py`` parses calls. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.call_values import ToolCall
from align.environments.episode import call_id
from align.environments.guarded_rendering import GuardedRenderer, Message, private_name
from align.errors import UserError
from align.models.chat.named_templates import templates_with_tools, training_templates
from align.models.chat.render import require_chat_template

QUESTION = "Qanat"
NEXT = "Xylem"
RESULT = "Vortex"
TEXT = "Zephyrus"
"""Rare words of the probes. All other text in a rendering is the template's."""
ASKED: list[Message] = [{"role": "user", "content": QUESTION}]
FIELD = "the model stage's chat_template field"
DATE = re.compile(r"\d{1,2} \w{3,9} \d{4}")
THOUGHT_OPENED = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True)
class Probe:
    """A short conversation: messages, the policy's answer, and the messages after it."""

    before: Sequence[Message]
    text: str
    after: Sequence[Message]
    calls: tuple[ToolCall, ...] = ()


class TurnTemplate:
    """The use of a tokenizer's chat template in episodes."""

    eos: int
    """The token that ends a turn of the policy."""
    template: str
    """Text of the template that is used: the model's own, or a training template."""
    training: str = ""
    """Name of the training template; "" for the model's own."""

    def __init__(self, tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None, where: str) -> None:
        """Choose a template for conversations with ``tools``; ``where`` names the model in messages.

        Raises ``UserError`` for a tokenizer without template, tools that it has no place for, and a template that is
        not prefix-preserving if no training template fits.
        """
        require_chat_template(tokenizer, where)
        if tokenizer.eos_token_id is None:
            raise UserError(f"{where} has no eos token, so no turn could end. Bring it in through a model stage.")
        self._renderer = GuardedRenderer(tokenizer, where)
        self._tools = list(tools) if tools else None
        self._where = where
        self.eos = int(tokenizer.eos_token_id)
        self._end = private_name(self.eos)
        self.template = str(tokenizer.get_chat_template(tools=self._tools))
        self._choose(set(tokenizer.get_vocab()))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation's beginning, up to the start of the policy's turn."""
        return self._renderer.encode(self._text(self.template, messages, add_generation_prompt=True))

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a whole conversation; after an answer they end with its end of turn.

        The text of an assistant message is a turn as it was sampled, with its calls in it.
        """
        text = self._text(self.template, messages)
        if messages[-1]["role"] == "assistant":
            # A policy stops at the end of turn, so the text after it is removed.
            text = text[: text.rindex(self._end) + len(self._end)]
        return self._renderer.encode(text)

    def between(
        self, messages: Sequence[Message], calls: Sequence[ToolCall] = (), prompt: Sequence[Message] = ()
    ) -> list[int]:
        """Return the ids that follow a sampled turn: the rest of its ending, ``messages``, and the next turn's start.

        Args:
            messages: Messages after the turn; results of tools are in the order of ``calls``.
            calls: Calls in the turn.
            prompt: Beginning of the conversation. In some templates its system message determines how turns start.
        """
        probe = Probe(prompt or ASKED, TEXT if not calls else "", _with_ids(messages, calls), tuple(calls))
        try:
            answered, continued = self._renderings(self.template, probe)
        except NotPreserving as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(f"{self._where}: before the roles {roles}, its chat template has {error}.") from None
        # The end of turn is encoded with the text after it, because some tokenizers add white space to a token.
        ids = self._renderer.encode(continued[len(answered) - len(self._end) :])
        if ids[:1] != [self.eos]:
            raise UserError(f"{self._where}: its tokenizer merges the end of turn with the text after it.")
        return ids[1:]

    def _choose(self, vocabulary: set[str]) -> None:
        """Keep the model's template, or choose a training template that writes the same prompts."""
        fault = self._missing_tools(self.template) or self._fault(self.template)
        if fault is None:
            return
        # A training template keeps earlier turns. It does not add a place for tools.
        if not fault.startswith("no place"):
            for name, text in training_templates(self.template, vocabulary):
                if self._writes_same_prompts(text) and (self._missing_tools(text) or self._fault(text)) is None:
                    self.template = text
                    self.training = name
                    return
        with_tools = templates_with_tools(vocabulary)
        fitting = f"one of align's that fits its tokens ({', '.join(with_tools)}), or " if with_tools else ""
        raise UserError(
            f"{self._where}: its chat template has {fault}. Name another in {FIELD}: {fitting}a Jinja file."
        )

    def _missing_tools(self, template: str) -> str | None:
        """Return a description of missing support for tools; None if the template writes them and their results."""
        if not self._tools:
            return None
        prompt = self._try(template, ASKED, add_generation_prompt=True)
        names = [_tool_name(tool) for tool in self._tools]
        missing = [name for name in names if prompt is not None and name not in self._renderer.readable(prompt)]
        if missing:
            return f"no place for tools, and the environment has {', '.join(missing)}"
        call = ToolCall(names[0], {}, "")
        results = _with_ids([{"role": "tool", "content": RESULT}], [call])
        rendered = self._try(template, [*ASKED, _answer("", [call]), *results])
        # A template that cannot write calls may still write results after a text.
        rendered = rendered or self._try(template, [*ASKED, _answer(TEXT), *results])
        if rendered is None or RESULT not in rendered:
            return "no place for the results of tools (the role 'tool')"
        return None

    def _fault(self, template: str) -> str | None:
        """Return the reason why a template cannot be used in episodes; None if it can."""
        # Some templates open a thought in the prompt. The sampled turn then begins inside it.
        start = self._try(template, ASKED, add_generation_prompt=True)
        opened = THOUGHT_OPENED.search(self._renderer.readable(start)) if start else None
        # Each probe tests a case in which known templates rewrite earlier text.
        probes = [
            Probe(ASKED, TEXT, [{"role": "user", "content": NEXT}]),
            Probe(ASKED, f"<think>\n{RESULT}\n</think>\n\n{TEXT}", [{"role": "user", "content": NEXT}]),
            # A second turn after the first.
            Probe([*ASKED, _answer(TEXT), *ASKED], TEXT, [{"role": "user", "content": NEXT}]),
            Probe([{"role": "system", "content": NEXT}, *ASKED], TEXT, ASKED),
        ]
        if self._tools:
            call = ToolCall(_tool_name(self._tools[0]), {}, "")
            result = {"role": "tool", "content": RESULT}
            after = _with_ids([result], [call])
            probes.append(Probe(ASKED, "", after, (call,)))
            probes.append(Probe([*ASKED, _answer(TEXT), {"role": "tool", "content": RESULT}], TEXT, ASKED))
        for probe in probes:
            if self._try(template, probe.before, add_generation_prompt=True) is None:
                if probe.before[0]["role"] != "system":
                    return f"no way to write the roles {', '.join(str(message['role']) for message in probe.before)}"
                continue  # a template may refuse system messages
            fault = self._fault_of(template, probe, opened)
            if fault is not None:
                return fault
        return None

    def _fault_of(self, template: str, probe: Probe, opened: re.Match[str] | None) -> str | None:
        if opened and not probe.calls:
            text = probe.text if probe.text.startswith("<think>") else "<think>\n</think>\n\n" + probe.text
            # The turn as sampled begins within the thought that the prompt opens.
            probe = Probe(probe.before, opened.group() + text.removeprefix("<think>").lstrip(), probe.after)
        try:
            start = self._text(template, probe.before, add_generation_prompt=True)
            answered, _ = self._renderings(template, probe, start)
            if probe.text not in self._renderer.readable(answered):
                return f"answers that lose a part of their text, such as {probe.text!r}"
        except NotPreserving as error:
            return str(error)
        except UserError as error:
            return f"no way to go on: {error}"
        return None

    def _renderings(self, template: str, probe: Probe, start: str = "") -> tuple[str, str]:
        """Return a probe's rendering up to the end of its answer, and all of it with the next turn's start.

        Raises ``NotPreserving`` if the second does not begin with the first, or the first not with ``start``.
        """
        # Some templates write only one call in a turn; others refuse calls.
        answers = [_answer(probe.text, probe.calls), _answer(probe.text, probe.calls[:1]), _answer(TEXT)]
        for answer in answers:
            answered = self._try(template, [*probe.before, answer])
            if answered is not None:
                break
        else:
            # The last attempt raises the template's message.
            answered = self._text(template, [*probe.before, answer])
        # The answer ends at its end of turn. The text after it belongs to the next turn.
        end = answered.rfind(self._end)
        if end < len(start):
            raise NotPreserving(
                f"no {self._renderer.readable(self._end)!r} at the end of an answer, which is the tokenizer's eos, and "
                "the policy's turns end with it"
            )
        answered = answered[: end + len(self._end)]
        continued = self._text(template, [*probe.before, answer, *probe.after], add_generation_prompt=True)
        self._require_beginning(start, answered, "once the prompt is answered")
        self._require_beginning(answered, continued, "once the conversation goes on")
        return answered, continued

    def _require_beginning(self, first: str, second: str, occasion: str) -> None:
        if second.startswith(first):
            return
        # Compare ids instead of characters, because the policy samples ids.
        before = self._renderer.encode(first)
        after = self._renderer.encode(second)
        pairs = enumerate(zip(before, after, strict=False))
        place = next((index for index, (a, b) in pairs if a != b), min(len(before), len(after)))
        old, new = (
            repr(self._renderer.tokenizer.decode(ids[place : place + 1])) if place < len(ids) else "nothing"
            for ids in (before, after)
        )
        raise NotPreserving(
            f"turns that change {occasion}: token {place + 1} of a conversation is {old} and becomes {new}"
        )

    def _writes_same_prompts(self, text: str) -> bool:
        """Return whether a training template writes the same prompts as the model's template, except for dates."""
        system: list[Message] = [{"role": "system", "content": NEXT}]
        is_same = []
        for messages in (ASKED, [*system, *ASKED]):
            prompt, training_prompt = (
                self._try(template, messages, add_generation_prompt=True) for template in (self.template, text)
            )
            # A template may refuse a system message. Then only the prompt without it is compared.
            if prompt is not None:
                is_same.append(training_prompt is not None and DATE.sub("", prompt) == DATE.sub("", training_prompt))
        return bool(is_same) and all(is_same)

    def _text(self, template: str, messages: Iterable[Message], add_generation_prompt: bool = False) -> str:
        return self._renderer.text(template, list(messages), self._tools, add_generation_prompt)

    def _try(self, template: str, messages: Iterable[Message], add_generation_prompt: bool = False) -> str | None:
        """Return a rendering; None if the template refuses it."""
        try:
            return self._text(template, messages, add_generation_prompt)
        except UserError:
            return None


class NotPreserving(UserError):
    """The template changes the beginning of a conversation."""


def _answer(text: str, calls: Sequence[ToolCall] = ()) -> Message:
    answer: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        answer["tool_calls"] = []
    for index, call in enumerate(calls):
        function = {"name": call.name, "arguments": call.arguments}
        answer["tool_calls"].append({"type": "function", "id": call_id(call, index), "function": function})
    return answer


def _with_ids(messages: Sequence[Message], calls: Sequence[ToolCall]) -> list[Message]:
    """Return messages with the calls' ids in the results of tools."""
    remaining = list(enumerate(calls))
    with_ids: list[Message] = []
    for message in messages:
        if message["role"] == "tool" and remaining:
            index, call = remaining.pop(0)
            message = {"tool_call_id": call_id(call, index), "name": call.name, **message}
        with_ids.append(message)
    return with_ids


def _tool_name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name"))
