"""Names that scripts import: ``from align import Pipeline, Run``."""

from __future__ import annotations

from typing import Any

from align.pipeline import pipeline
from align.runner.runner import Run, run_pipeline


class Pipeline(pipeline.Pipeline):
    """A pipeline that a script can run. Checked when it is made, and never changed: ``set`` returns a new one."""

    def run(self, **options: Any) -> Run:
        """Run the stages that are not cached; options as of ``align.runner.runner.run_pipeline``."""
        return run_pipeline(self, **options)


__all__ = ["Pipeline", "Run"]
