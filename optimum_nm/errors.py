"""The one exception a user can cause."""


class NMError(ValueError):
    """Input that optimum-nm cannot accept.

    The message is one sentence that names the thing, its value and what would be right; the command line prints it
    on one line and exits with status 1.

    Attributes:
        reported: another process of the same run prints it.
    """

    reported = False


class Interrupted(NMError):
    """A run ended early for a reason that is not in what it was given: another try may go on from where it stopped."""
