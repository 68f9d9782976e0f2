"""Models: where they come from, how they are loaded, rendered for and saved."""
