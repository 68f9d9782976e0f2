"""The work of each kind of stage: one file with ``run`` per kind."""
