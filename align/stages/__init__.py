"""One thin file per stage: its configuration and ``run``."""
