"""Sweeps: trials of a pipeline over a search space; stages that trials share run once. No torch.

``config.py`` has the file's fields, ``space.py`` the search space, ``objectives.py`` the objectives, ``plan.py`` checks
them against the pipeline, ``study.py`` keeps the trials in Optuna, ``worker.py`` runs them.
"""
