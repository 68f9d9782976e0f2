"""Stored rollouts of a store: queries with DuckDB, and the view of the studio that shows them."""
