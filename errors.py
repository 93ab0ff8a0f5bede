"""The error that commands report in one line, and others made into it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ShortVError(Exception):
    """A failure that the user can mend; the message is one line that says what is wrong, where and what to do."""


@contextmanager
def one_line(message: Callable[[Exception], str], *passing: type[Exception]) -> Iterator[None]:
    """Whatever libraries raise on strangers' files, settings and servers becomes a ShortVError.

    This is the one place that takes every kind of error: which one it is differs by library and version, and is
    documented by none of them.

    Args:
        message: makes the line from the error.
        passing: kinds that are left as they are; ShortVError always is.
    """
    try:
        yield
    except (ShortVError, *passing):
        raise
    except Exception as error:
        raise ShortVError(message(error)) from error


def first_line(error: BaseException) -> str:
    """What an error says, without what it adds below; the name of its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: Exception) -> str:
    """What the system says of an operation that failed, without number and path; of others what they say."""
    return getattr(error, "strerror", None) or first_line(error)
