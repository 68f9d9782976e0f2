"""The page about one run: costs, pipeline diagram, data ledgers, and the page that puts all sections together."""
