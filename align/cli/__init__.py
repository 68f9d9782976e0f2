"""What the groups of commands do (``align data ...``); ``align.cli.main`` is the command line itself."""
