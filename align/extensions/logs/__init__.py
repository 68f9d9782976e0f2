"""Logs of other projects: conversations of a stage for inspect_ai and trackio."""

from align.registry import Command, Extension

EXTENSION = Extension(
    "logs of inspect_ai and traces of trackio",
    (
        Command(
            "export-log",
            "write rollouts or evaluated answers as logs of inspect_ai or traces of trackio",
            "align.extensions.logs.export_log",
            works=True,
        ),
    ),
)
