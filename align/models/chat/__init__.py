"""Chat templates: rendering with limits, special tokens, and the tokens of answers."""
