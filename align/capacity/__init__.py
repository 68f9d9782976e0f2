"""Memory of a pipeline's stages on given hardware, from configs and ``config.json``. Never imports torch.

``memory`` describes one process. The ``estimate_*`` modules count it for each kind of stage, ``sharding`` and
``sampling`` find how a stage that trains or samples fits on devices, and ``plan`` does so for a pipeline.
"""
