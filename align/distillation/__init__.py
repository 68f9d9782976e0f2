"""The work of the ``distill`` stage: student, teacher and engine brought together."""
