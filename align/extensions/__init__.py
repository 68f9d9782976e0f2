"""Parts that fewer than one user in ten needs: a folder each, found by ``EXTENSION`` in its ``__init__.py``."""
