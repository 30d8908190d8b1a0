"""Mistakes of the caller, told apart from mistakes of this package."""


class UsageError(ValueError):
    """An argument, file or model that cannot be used; the message says what was given, what can be, and a remedy."""
