"""Sweeps: a space over a pipeline's fields, tried out trial by trial; what trials share is made once. No torch.

``config.py`` reads the file, ``space.py`` what varies, ``objectives.py`` what decides, ``plan.py`` checks it all
against the pipeline, ``study.py`` and ``optuna_words.py`` alone speak to Optuna, ``work.py`` runs trials,
``summary.py`` says what came of them.
"""
