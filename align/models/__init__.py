"""Models: sources, loading and checking, chat templates, precision, sharding, tuning, and scoring."""
