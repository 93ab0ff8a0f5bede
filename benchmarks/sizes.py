"""Shapes of the measured models, and their layers to replace."""

from collections.abc import Sequence
from typing import NamedTuple

from shortv_llava.checkpoint.published import PUBLISHED
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.methods import Method, check_layers


class Shape(NamedTuple):
    """Sizes of a model and its images. A LLaVA-NeXT image is timed as five tiles of LLaVA-1.5's size in a row."""

    width: int
    num_layers: int
    ffn: int
    head_size: int = 64
    image_side: int = 24  # a tile has image_side ** 2 visual tokens
    tiles: int = 1
    published: str | None = None  # name of the published model with this shape's list of layers
    family: str = "llava"  # model type of the stock model
    key_heads: int | None = None  # of keys and values; by default as many as of queries

    @property
    def visual_tokens(self) -> int:
        return self.tiles * self.image_side**2

    def layers(self, number: int) -> list[int]:
        """The first `number` layers of the published list, if any, followed by the others from the last layer down."""
        order = list(PUBLISHED[self.published].replaced_layers) if self.published else []
        order += [layer for layer in reversed(range(self.num_layers)) if layer not in order]
        return order[:number]


def scaled(width: int = 1024, num_layers: int = 16, image_side: int = 24, tiles: int = 1) -> Shape:
    """A shape with Llama's proportions, at any width that is a whole number of heads."""
    if width % 64:
        raise ShortVError(f"--width {width}: give a multiple of 64, the size of a head")
    return Shape(width, num_layers, width * 43 // 16, image_side=image_side, tiles=tiles)


SHAPES = {
    "scaled": scaled(),
    "scaled-next": scaled(tiles=5),
    "llava-1.5-7b": Shape(4096, 32, 11008, 128, published="llava-1.5-7b"),
    "llava-1.5-13b": Shape(5120, 40, 13824, 128, published="llava-1.5-13b"),
    "llava-next-7b": Shape(4096, 32, 11008, 128, tiles=5, published="llava-next-7b"),
    "llava-next-13b": Shape(5120, 40, 13824, 128, tiles=5, published="llava-next-13b"),
    # The proportions of Qwen2.5-7B, which both have, and pictures of 896 x 896 pixels.
    "qwen2.5vl": Shape(1024, 16, 5408, 128, 32, family="qwen2_5_vl", key_heads=1),
    "internvl": Shape(1024, 16, 5408, 128, 16, tiles=4, family="internvl", key_heads=1),
}


def find_shape(name: str) -> Shape:
    """The shape of this name; raises [`ShortVError`] if there is none."""
    if name not in SHAPES:
        raise ShortVError(f"there is no model {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def check_layers_of(names: Sequence[str], numbers: Sequence[int], methods: Sequence[Method]) -> None:
    """Raises [`ShortVError`] if a model has fewer layers than one of `numbers`, or than a method needs."""
    for name in names:
        num_layers = find_shape(name).num_layers
        if any(not 0 <= number <= num_layers for number in numbers):
            raise ShortVError(f"--layers: {name} has {num_layers}; give numbers between 0 and {num_layers}")
        check_layers(methods, num_layers)
