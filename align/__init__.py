"""align: from a base model to an aligned, scored checkpoint, in one cached and resumable pipeline."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from align.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Load ``Pipeline`` on first use, so that ``import align`` stays instant."""
    if name == "Pipeline":
        from align.pipeline.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'align' has no attribute {name!r}")
