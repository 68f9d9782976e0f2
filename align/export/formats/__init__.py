"""Export formats other than a plain transformers folder."""
