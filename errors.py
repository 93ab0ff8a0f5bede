"""The error that commands report in one line, and conversion of other errors into it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ShortVError(Exception):
    """A failure that the user can fix; the message is one line that says what is wrong, where and what to do."""


@contextmanager
def one_line(message: Callable[[Exception], str], *passing: type[Exception]) -> Iterator[None]:
    """Convert errors that libraries raise on files, settings and servers of others into a ShortVError.

    This is the only place that catches every kind of error: the kind differs by library and version, and no library
    documents it.

    Args:
        message: returns the line for an error.
        passing: kinds of errors that are not converted; ShortVError never is.
    """
    try:
        yield
    except (ShortVError, *passing):
        raise
    except Exception as error:
        raise ShortVError(message(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: Exception) -> str:
    """The system's message for a failed operation, without number and path; for other errors their message."""
    return getattr(error, "strerror", None) or first_line(error)
