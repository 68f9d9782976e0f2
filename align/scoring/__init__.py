"""Scores of responses: from the entries of ``score:`` to one number per response.

``score.py`` opens the entries (``align.config.scores``) and adds their weighted scores. Each kind of entry has a file:
``functions.py``, ``verifiers.py``, ``judges.py`` and ``models.py``. All return ``Scored`` (``scored.py``).
Torch-free at import.
"""
