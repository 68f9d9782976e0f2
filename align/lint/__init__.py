"""Looks at a dataset as a model will see it, token by token, and names what is wrong. See docs/lint.md."""
