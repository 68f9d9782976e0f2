"""Sweeps: trials of a pipeline over a search space; stages that trials share run once. Never imports torch.

``config.py`` has the file's fields and the search space, ``plan.py`` checks them against the pipeline, ``study.py``
keeps the trials in Optuna, ``worker.py`` runs them, ``worker_pool.py`` and ``on_cluster.py`` start workers.
"""

from align.registry import Command, Extension, Topic

EXTENSION = Extension(
    "searches over a pipeline's fields",
    (
        Command(
            "sweep",
            "try out a space over a pipeline's fields; unchanged stages are made once, an interrupted sweep goes on",
            "align.extensions.sweep.command",
            works=True,
        ),
        Topic(
            "sweep",
            "Sweep file",
            "What `align sweep` varies over a pipeline, and what decides.",
            ("align.extensions.sweep.config:SweepConfig", "align.extensions.sweep.config:RangeConfig"),
        ),
    ),
)
