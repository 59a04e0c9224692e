"""The one exception that means: the input or the call is at fault, not the program."""


class UserError(ValueError):
    """Bad input. The message says what was expected and what came; the command line prints it without a traceback."""
