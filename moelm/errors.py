"""The exception for problems that the user can fix, and the messages of other exceptions."""


class MoelmError(Exception):
    """A problem with the user's input or machine, described in one sentence."""

    exit_code = 2
    """Exit status of the command."""
    reported = False
    """Whether another process of the same run has printed the message."""


def first_line(error: object) -> str:
    """The first line of a message, without its last full stop or colon; the type of an error without a message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
