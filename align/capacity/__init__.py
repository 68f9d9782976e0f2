"""Which hardware a pipeline fits on, and what it takes there: counted from configs and ``config.json``. Never torch.

``hardware`` says what devices are, ``strategies`` in which ways they can work together, ``sharing`` what each holds
then, ``timing`` how long that takes, ``choosing`` which way is best; ``plan`` does it for a pipeline, ``table`` shows.
"""
