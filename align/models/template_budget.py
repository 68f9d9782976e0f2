"""A budget for one rendering of a chat template: steps, and characters and items. Torch-free.

Left out: what counts as a step (``chat_template.py``).
"""

from __future__ import annotations

import threading
import time

from jinja2 import TemplateError

STEPS = 2_000_000
"""Loop turns, calls and filters of one rendering; a conversation of 1,000 turns takes about 10,000."""
SIZE = 500_000_000
"""Characters and items that one rendering makes in all; a text that grows turn by turn is made many times."""
SECONDS = 60.0
"""Of processor time. No template that is counted right comes near it."""
STEPS_BETWEEN_LOOKS = 4096


class TemplateOutOfBounds(TemplateError):
    """A template that did more than any chat template does; the message continues a sentence about it."""


class Budget:
    """The steps and the size that one rendering may still spend."""

    def __init__(self) -> None:
        self.steps, self.size = STEPS, SIZE
        self.end, self.next_look = time.thread_time() + SECONDS, STEPS - STEPS_BETWEEN_LOOKS

    def step(self, count: int = 1) -> None:
        """Spend steps."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateOutOfBounds(f"did not end within {STEPS} steps")
        if self.steps < self.next_look:
            self.next_look = self.steps - STEPS_BETWEEN_LOOKS
            if time.thread_time() > self.end:
                raise TemplateOutOfBounds(f"did not end within {SECONDS:g} seconds")

    def make(self, size: int) -> None:
        """Spend characters or items, before they are made where that can be known."""
        self.size -= size
        if self.size < 0:
            raise TemplateOutOfBounds(f"makes more than {SIZE} characters")


class LocalBudget(threading.local):
    """The budget of the rendering under way in a thread."""

    def __init__(self) -> None:
        self.budget = Budget()
