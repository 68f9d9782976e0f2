"""Environments: conversations of several turns, with the tools and scores that a policy meets in them."""
