"""Synthetic data: new instructions, responses, the best of several, and on-policy pairs.

``config.py`` has the stage's fields, ``run.py`` its work, ``instructions.py``, ``selection.py`` and ``pairing.py`` its
tasks, ``local_model.py`` answers requests with a checkpoint of the pipeline, ``estimate.py`` counts memory.
"""

from align.registry import Extension, Stage

EXTENSION = Extension(
    "data from a model or an endpoint",
    (
        Stage(
            "synthesize",
            6,
            None,
            "align.extensions.synthesis.config:SynthesizeConfig",
            "align.extensions.synthesis.run:synthesize",
            "make instructions, responses or pairs with a model or an endpoint",
            samples=True,
            estimator="align.extensions.synthesis.estimate",
        ),
    ),
)
