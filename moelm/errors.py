"""The one exception a user is meant to see: a sentence about something they can mend."""


class MoelmError(Exception):
    """A problem with the user's input or machine, told in one sentence (the command exits with code 2)."""
