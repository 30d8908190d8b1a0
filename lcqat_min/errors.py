"""Mistakes of the caller, told apart from mistakes of this package.

A UsageError says what was given, what is accepted and what to do. The command line prints it as one line; any other
exception is a bug of this package and keeps its traceback (cli/main.py). Python code sees an ordinary ValueError.
"""


class UsageError(ValueError):
    """What the caller gave cannot be used: an argument, a file, a model or a text."""
