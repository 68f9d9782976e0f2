"""One self-contained HTML page about a run: tables, figures, curves, samples."""
