"""Memory of a pipeline's stages on given hardware, from configs and ``config.json``. Never imports torch.

``memory`` describes one process. The ``estimate_*`` modules count it for each kind of stage, ``sharding`` divides it
among devices, ``training_ways`` and ``sampling_ways`` find how a stage fits, and ``plan`` does so for a pipeline.
"""
