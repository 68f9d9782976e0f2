"""What names an artifact's contents."""

from pathlib import Path

from align.store.artifacts import Artifact, Kind


def checkpoint(key: str, **files: str) -> Artifact:
    outputs = {f"model/{name}.safetensors": {"sha256": digest} for name, digest in files.items()}
    return Artifact(
        "sft", Kind.POLICY, Path(), {"key": key, "kind": "sft", "outputs": outputs | {"a.json": {"sha256": key}}}
    )


def test_weights_of_one_key_made_twice_are_told_apart():
    """A cache of answers must not serve those of weights that a rebuild replaced."""
    assert checkpoint("k", w="1").weights == checkpoint("k", w="1").weights
    assert checkpoint("k", w="1").weights != checkpoint("k", w="2").weights
    assert checkpoint("k", w="1").weights == checkpoint("other", w="1").weights
    assert checkpoint("k", a="1", b="2").weights != checkpoint("k", a="2", b="1").weights
    assert checkpoint("k").weights == "k"  # nothing recorded
