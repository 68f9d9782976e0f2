"""The families of checkable instructions: word bank, and one file per sort of constraint."""
