"""Parts that every page is built from: templates, escaping, panels, number formats and the files next to a page."""
