"""Sweeps: trials of a pipeline over a search space; stages that trials share run once. Never imports torch.

``config.py`` has the file's fields and the search space, ``plan.py`` checks them against the pipeline, ``study.py``
keeps the trials in Optuna, ``worker.py`` runs them.
"""
