"""Runs of a store as the command line and the studio show them: stages, states, pages, stop and resume."""
