"""The errors a user sees, and the exit code of each.

Everything else that escapes is a bug in align and keeps its traceback.
"""


class UserError(Exception):
    """The user's input is wrong: exit code 2, one message with the place and the remedy, no traceback."""

    exit_code = 2


class StageFailed(Exception):
    """A stage ended without its artifact: exit code 1, the message names the stage and the path of its log."""

    exit_code = 1
