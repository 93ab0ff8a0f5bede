"""Messages for the Hub's errors."""

import contextlib
import errno
import re
import textwrap
from collections.abc import Iterator

from shortv_llava.errors import ShortVError, first_line, one_line


def hub_reason(error: BaseException) -> str:
    """Why a request to the Hub failed and what to do about it, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):  # the client's own, as of a card
        return textwrap.shorten(str(error), 300, placeholder=" ...")
    causes = [error]  # the client often wraps the Hub's answer in an error of its own
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    answer = next((cause for cause in causes if getattr(cause, "response", None) is not None), None)
    texts = [str(cause) for cause in causes]
    if any(re.search("xet-(read|write)-token", text) and re.search(r"\b(404|405|501)\b", text) for text in texts):
        return "this Hub does not speak Xet; set HF_HUB_DISABLE_XET=1 and run this again"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set; unset it and run this again"
    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes):
        return "there is no space left on this machine's disk; make room and run this again"
    if answer is None:
        reason = re.sub(r"\?\S+", "", first_line(causes[-1]))  # links to the storage are signed
        return f"{reason}; check the connection to the Hub and run this again"
    status, said = answer.response.status_code, getattr(answer, "server_message", None)
    said = f"{status}: {' '.join(said.split())}" if said else f"{status}"
    if isinstance(answer, GatedRepoError):
        return "it is gated; ask for access on its page, then run this again"
    if isinstance(answer, RepositoryNotFoundError):
        return "no such repository, or the token may not see it; check the id, and the token with `hf auth whoami`"
    if isinstance(answer, RevisionNotFoundError):
        return "there is no such revision; check its name"
    if status == 401:
        return "the token is not accepted; run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"no permission ({said}); use a token that may write there"
    if status in (409, 412):
        return "it is being changed by someone else; run this again"
    if status == 429:
        seconds = answer.response.headers.get("Retry-After", "")
        return f"too many requests; run this again in {f'{seconds} seconds' if seconds.isdigit() else 'a few minutes'}"
    if status in (405, 501):
        return f"this Hub does not offer that ({said}); check HF_ENDPOINT, or use huggingface.co"
    if status >= 500:
        return f"the Hub failed ({said}); run this again"
    return f"the Hub refused ({said})"


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of requests to a repository into a [`ShortVError`] of one line."""
    from huggingface_hub.errors import HFValidationError

    try:
        with one_line(lambda error: f"{repo_id}: {hub_reason(error)}", HFValidationError):
            yield
    except HFValidationError as error:
        raise ShortVError(f"{repo_id}: no id of a repository ({first_line(error)})") from error
