"""Memory, time and cost of a pipeline's stages on given hardware, from configs and ``config.json``. Never imports
torch.

``estimators`` say what each kind of stage asks of devices, ``hardware`` describes the devices, and ``layouts`` the
ways in which these work together. ``training_ways`` and ``sampling_ways`` find the cheapest way that fits, ``plan``
does so for a pipeline, and ``table`` prints it.
"""
