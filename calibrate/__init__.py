"""Layer Contribution (LC) scores and the choice of layers."""

from typing import Literal

Tokens = Literal["visual", "text", "all"]
Direction = Literal["release", "paper"]
Granularity = Literal["layer", "block"]
Strategy = Literal["lc", "corrected-lc", "greedy", "cosine", "random"]
AROUND = 2  # numbers of layers whose cost is shown, below the chosen one and above


def __getattr__(name: str):
    if name == "layer_contribution":  # imported on first use, as in the package's __init__.py
        from shortv_llava.calibrate.contribution import layer_contribution

        return layer_contribution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
