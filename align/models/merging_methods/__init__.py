"""Several checkpoints of one base made into one: the maths, the weights as they come from disk, and what is checked."""
