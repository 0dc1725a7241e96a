"""The one exception a user is meant to see: a sentence about something they can mend."""


class MoelmError(Exception):
    """A problem with the user's input or machine, told in one sentence."""

    exit_code = 2
    """What the command ends with."""
    told = False
    """Whether another process of the same run has said it already."""
