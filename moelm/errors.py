"""The exception for problems that the user can fix."""


class MoelmError(Exception):
    """A problem with the user's input or machine, described in one sentence."""

    exit_code = 2
    """Exit status of the command."""
    reported = False
    """Whether another process of the same run has printed the message."""
