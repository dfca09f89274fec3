"""The one kind of error that is the user's mistake and not ours; every module may raise it."""


class UserError(ValueError):
    """Tell a mistake of the user's: the message names the argument, its value, the range and the way out, in one line.

    Programs print it as one line and exit with code 2 (`cli.run`). Every other exception keeps its traceback.
    """
