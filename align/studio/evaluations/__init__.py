"""Items of finished evaluations, and the view of the studio that shows them."""
