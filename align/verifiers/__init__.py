"""Verifiers: programs that compare an answer with a reference, and say why it fails. Torch-free."""
