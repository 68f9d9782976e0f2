"""The budget of one rendering of a chat template: steps, and characters and items. Torch-free.

Left out: counting them (``chat_template.py``).
"""

from __future__ import annotations

import threading
import time

from jinja2 import TemplateError

STEPS = 2_000_000
"""Loop iterations, calls and filters of one rendering; a conversation of 1,000 turns takes about 10,000."""
SIZE = 500_000_000
"""Characters and items that one rendering creates; a text that grows with each turn is created many times."""
SECONDS = 60.0
"""Processor time. No template that is counted correctly comes near it."""
STEPS_BETWEEN_CLOCK_READS = 4096


class TemplateOutOfBounds(TemplateError):
    """A template that exceeded its budget; the message continues a sentence about it."""


class Budget:
    """Steps and size that one rendering may still spend."""

    def __init__(self) -> None:
        self.steps, self.size = STEPS, SIZE
        self.deadline = time.thread_time() + SECONDS
        self.next_clock_read = STEPS - STEPS_BETWEEN_CLOCK_READS

    def step(self, count: int = 1) -> None:
        """Spend steps."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateOutOfBounds(f"did not end within {STEPS} steps")
        # Reading the clock costs more than a step, so it is read every few thousand steps.
        if self.steps < self.next_clock_read:
            self.next_clock_read = self.steps - STEPS_BETWEEN_CLOCK_READS
            if time.thread_time() > self.deadline:
                raise TemplateOutOfBounds(f"did not end within {SECONDS:g} seconds")

    def make(self, size: int) -> None:
        """Spend characters or items, before they are created where their number is known."""
        self.size -= size
        if self.size < 0:
            raise TemplateOutOfBounds(f"makes more than {SIZE} characters")


class LocalBudget(threading.local):
    """The budget of the current rendering in each thread."""

    def __init__(self) -> None:
        self.budget = Budget()
