"""The one exception that every floor of the house may raise."""


class UserError(ValueError):
    """A mistake of the user's: the message names the argument, its value, the range and the way out, in one line.

    Programs print it as one line and exit with code 2 (`cli.run`). Every other exception keeps its traceback.
    """
