"""The preview page of a dataset build, and rows as a model sees them."""
