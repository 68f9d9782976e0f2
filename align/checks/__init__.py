"""Checks on what one stage hands to the next, whatever its tuning: each fault has a name, and is refused by it.

``faults.py`` lists them. ``facts.py`` writes down, in ``model/align.json``, what a finished checkpoint is (template,
tokenizer, head, base), so that a later change shows; ``folder.py`` looks at one folder, ``stage.py`` at all inputs of
a stage before it starts and at its result before it is published. Reads files, loads no model, imports no torch.
"""
