"""Parts that every page is built from: templates, escaping, panels, curves, number formats, files next to a page."""
