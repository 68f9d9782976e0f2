"""Isolation of programs that a model wrote: one interface over bubblewrap, Landlock and a user's command."""
