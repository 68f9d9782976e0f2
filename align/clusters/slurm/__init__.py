"""A run's stages as jobs of Slurm: submitted with their dependencies, followed, asked to stop, queued again."""
