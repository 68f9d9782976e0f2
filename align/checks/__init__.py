"""Check the checkpoints that one stage passes to the next. Each fault has a name, by which it is refused or waived.

``faults.py`` has the faults. ``facts.py`` records digests of a finished checkpoint (template, tokenizer, head, base) in
``model/align.json``, so that later changes are found. ``folder.py`` checks one folder; ``stage.py`` checks all inputs
of a stage before it starts and its result before it is published. Reads files, loads no model, imports no torch.
"""
