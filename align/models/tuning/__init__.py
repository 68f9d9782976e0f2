"""What a way of fitting (``align.tuning``) does to a model: applied, referred to, saved. One module per family."""
