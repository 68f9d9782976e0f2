"""Human annotation of pairs of answers: questions, sessions, statistics, exchange with Label Studio."""

from align.registry import Command, Extension, View

EXTENSION = Extension(
    "pairs of answers that people compare",
    (
        Command(
            "annotate",
            "choose the better of two answers in the terminal; --report shows agreement and when to stop",
            "align.extensions.annotation.command",
        ),
        View("annotate", "Annotate", "align.extensions.annotation.view"),
    ),
)
