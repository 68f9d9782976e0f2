"""Functions that replace or read private parts of other packages: one file per package.

Nothing outside this package assigns to another package's attributes, swaps ``__class__`` or imports a name with an
underscore; ``tests/patches/test_outside.py`` enforces that. The docstring of each patch says which private name it
touches, why, and since which version. ``signatures.py`` refuses a version in which the name has changed.
"""
