"""The error that commands report in one line."""


class ShortVError(Exception):
    """A failure that the user can mend; the message is one line that says what is wrong, where and what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, without what it adds below; the name of its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: Exception) -> str:
    """What the system says of an operation that failed, without number and path; of others what they say."""
    return getattr(error, "strerror", None) or first_line(error)
