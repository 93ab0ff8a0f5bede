"""Short digests, by which changed files are told from those that results were made with."""

import hashlib
from collections.abc import Iterable


def digest(parts: Iterable[bytes]) -> str:
    """`sha256:` and 16 hex digits, of the parts in this order."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return f"sha256:{whole.hexdigest()[:16]}"
