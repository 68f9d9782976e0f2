"""The work of each kind of stage: a file for a kind, or for a family of kinds."""
