"""Builds of datasets from recipes: passes over shards, the ledger, and the finished files."""
