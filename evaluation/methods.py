"""Methods to save computation on visual tokens, as `--method` names them: ShortV, FastV, VTW, and combinations.

Methods: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", 2024 (FastV); Lin et al., "Boosting Multimodal Large
Language Models with Visual Tokens Withdrawal for Rapid Inference", 2024 (VTW).
"""

from collections.abc import Sequence
from typing import NamedTuple

from shortv_llava.errors import ShortVError

FORMS = "shortv, fastv:K:R, vtw:K, shortv+fastv:K:R or shortv+vtw:K"


class Dropping(NamedTuple):
    """From layer `layer` on, `share` of a prompt's visual tokens are dropped: FastV, and with a share of 1 VTW."""

    layer: int
    share: float

    def kept(self, visual_tokens: int) -> int:
        """Number of a prompt's visual tokens that are kept, rounded as in FastV's own code."""
        return round(visual_tokens * (1 - self.share))

    def visual_tokens(self, number: int, num_layers: int) -> list[int]:
        """Number of visual tokens that each layer gets, of `number`."""
        return [number] * self.layer + [self.kept(number)] * (num_layers - self.layer)


class Method(NamedTuple):
    """A method to save computation on visual tokens.

    Args:
        name: name in tables and file names.
        shortv: whether the model's own layers are replaced.
    """

    name: str
    shortv: bool
    dropping: Dropping | None


def parse_methods(given: str) -> list[Method]:
    """Methods from their names, separated by commas.

    Raises:
        ShortVError: if a name has none of the `FORMS` or is given twice.
    """
    methods = [_parse_method(name.strip()) for name in given.split(",")]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ShortVError(f"--method: {name} stands there twice")
    return methods


def _parse_method(given: str) -> Method:
    parts = given.split("+")
    shortv = parts[0] == "shortv"
    kind, *numbers = parts[shortv].split(":") if len(parts) > shortv else [None]
    if len(parts) > 1 + shortv or (kind, len(numbers)) not in ((None, 0), ("fastv", 2), ("vtw", 1)):
        raise ShortVError(f"--method: {given!r} is none of {FORMS}")
    if kind is None:
        return Method(given, shortv, None)
    try:
        layer, share = int(numbers[0]), float(numbers[1]) if kind == "fastv" else 1.0
    except ValueError:
        raise ShortVError(f"--method: {given!r} has something else than numbers; write {FORMS}") from None
    if layer < 1:
        raise ShortVError(f"--method: K of {given!r} is the first layer with fewer tokens, at least 1")
    if not 0 < share <= 1:
        raise ShortVError(f"--method: R of {given!r} is the share that is dropped, above 0 and at most 1")
    name = "shortv+" * shortv + f"{kind}-{layer}" + f"-{share:g}" * (kind == "fastv")  # no colons, for files
    return Method(name, shortv, Dropping(layer, share))


def check_layers(methods: Sequence[Method], num_layers: int) -> None:
    """Raises ShortVError if a method begins after a model's last layer."""
    for method in methods:
        if method.dropping is not None and method.dropping.layer >= num_layers:
            raise ShortVError(f"--method {method.name}: K is at most {num_layers - 1}, this model's last layer")
