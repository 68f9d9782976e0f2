"""Settings of a recipe: what a YAML below ``data_recipes/`` may say. The code that reads them is in ``align.data``."""
