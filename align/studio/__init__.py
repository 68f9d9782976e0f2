"""``align studio``: a local web application about a store, on FastAPI, server-sent events and plain modules."""
