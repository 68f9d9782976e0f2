"""What a way of fitting (``align.config.tuning``) does to a model: applied, referred to, saved."""
