"""Check the checkpoints that one stage passes to the next. Each fault has a name, by which it is refused or waived.

``facts.py`` has the faults, and records digests of a finished checkpoint (template, tokenizer, head, base) in
``model/align.json``, so later changes are found. ``stage.py`` checks a model folder, all inputs of a stage before it
starts, and its result before it is published. Reads files, loads no model, imports no torch.
"""
