"""A run's stages as tasks of a Ray cluster that exists already."""
