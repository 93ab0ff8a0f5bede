"""The error that commands report in one line."""


class ShortVError(Exception):
    """A failure that the user can mend; the message is one line that says what is wrong, where and what to do."""
