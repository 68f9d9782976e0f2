"""Export a checkpoint to a plain folder, verify it, write its model card, and push it to the Hub."""
