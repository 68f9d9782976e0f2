"""Groups of commands (``align data ...``); ``align.cli.main`` is the command line itself."""
