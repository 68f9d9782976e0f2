"""Limit the time and memory of chat templates, which are programs that come with a model.

transformers renders templates in Jinja's sandbox, which protects Python's internals but sets no limits: nested loops,
``'x' * 10**10`` or a text that is doubled forty times would hang or kill a stage. Here a template has ``SECONDS`` and
``MEMORY`` bytes, in the process that has loaded the model. Torch-free.

The memory limit is the process's, so it holds only while the main thread renders; other threads have the time limit.
Some C code cannot be interrupted, such as a comparison of deeply nested lists. After eight times the limit it ends the
process, with the stacks in its log. The linter checks what a template writes (``align.lint.chat_format``).
"""

from __future__ import annotations

import ctypes
import faulthandler
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.patches.transformers import wrap_templates
from align.pipeline.process_limits import alarm

SECONDS = 20.0
"""Time of one rendering; a conversation of 1,000 turns needs about 0.01."""
MEMORY = 1 << 30
"""Bytes that one rendering may add to the process."""


class TemplateOutOfBounds(TemplateError):
    """A template that exceeded a limit; the message continues a sentence about it."""


class _OutOfTime(TemplateOutOfBounds):
    def __init__(self, *_: Any) -> None:
        super().__init__(f"did not end within {SECONDS:g} seconds")


class LimitedTemplate:
    """A compiled template of transformers whose renderings have limits and raise only ``TemplateError``."""

    def __init__(self, template: Any) -> None:
        self.template = template
        self.environment = template.environment

    def render(self, **variables: Any) -> str:
        """Return the text."""
        with _limits():
            return str(self.template.render(**variables))

    def generate(self, **variables: Any) -> Iterator[str]:
        """Yield the text in pieces."""
        with _limits():
            yield from self.template.generate(**variables)


def limit_templates() -> None:
    """Limit every chat template that transformers compiles in this process; a second call has no effect."""
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGVTALRM, file=sys.__stderr__, chain=True)
    wrap_templates(with_limits)


def with_limits(compile_template: Callable[[str], Any]) -> Callable[[str], LimitedTemplate]:
    """Return a function that compiles templates like ``compile_template``, and limits them."""

    @lru_cache(maxsize=64)
    def compile_limited(chat_template: str) -> LimitedTemplate:
        with _limits():
            return LimitedTemplate(compile_template(chat_template))

    return compile_limited


@contextmanager
def _limits() -> Iterator[None]:
    """Limit the code inside. Raises ``TemplateError`` for any error in a template."""
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with _alarm() if is_main else _interruption():
            if is_main:
                with _memory_limit():
                    yield
            else:
                yield
    except TemplateError:
        raise
    except RecursionError:
        raise TemplateOutOfBounds("is nested too deeply, or calls itself without end") from None
    except MemoryError:
        raise TemplateOutOfBounds(f"needs more than {MEMORY >> 20} MiB of memory") from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise in the main thread after ``SECONDS``."""
    with alarm(SECONDS, _OutOfTime):
        # The default action of this timer's signal ends the process, without the help of the interpreter.
        signal.setitimer(signal.ITIMER_VIRTUAL, 8 * SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextmanager
def _interruption() -> Iterator[None]:
    """Raise in the current thread, which receives no signals, after ``SECONDS``."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    is_running = True

    def end() -> None:
        with lock:
            if is_running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_OutOfTime))

    # The lock keeps the exception inside of the block: once ``is_running`` is False, ``end`` does not raise it.
    timer = threading.Timer(SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_running = False


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Let this process grow by ``MEMORY`` bytes at most. Without Linux's ``/proc`` there is no limit."""
    try:
        with open("/proc/self/statm", "rb") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (size + MEMORY, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _GenerationTag(Extension):
    """Reads ``{% generation %}``, by which templates mark answers for transformers, as its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        """Return the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=1)
def template_environment() -> ImmutableSandboxedEnvironment:
    """Return an environment with the settings and functions of transformers' own, with one date for every day."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda format: "26 Jul 2024"}
    return environment


def render_text(template: str, **variables: Any) -> str:
    """Return the text that a template writes without a tokenizer. Raises jinja2's ``TemplateError``."""
    return with_limits(template_environment().from_string)(template).render(**variables)
