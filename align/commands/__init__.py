"""What the groups of commands do (``align data ...``); ``align.cli`` is the command line itself."""
