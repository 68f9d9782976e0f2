"""Training curves: metrics from a stage's events, and the panels that show them."""
