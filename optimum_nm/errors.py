"""The one exception a user can cause."""


class NMError(ValueError):
    """Input that optimum-nm cannot accept.

    The message is one sentence that names the thing, its value and what would be right; the command line prints it
    on one line and exits with status 1.
    """
