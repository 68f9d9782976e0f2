"""Models that judge responses: prompts, grades and criteria, and the client that asks a judge. Torch-free."""
