"""Pictures of coloured shapes with size, pattern and place, with questions in named kinds, captions and conversations.

The pictures are richer than those of the embedded checkpoint's `shapes_llava.shapes`, with the same outlines and
colours: up to six objects on a 4 x 4 grid, each with four attributes. Questions refer to objects by any attributes that
identify them. Pictures may have written numbers besides, of one to three digits. All random choices use the given
`random.Random`, so a seed determines a picture and its questions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

from PIL import Image, ImageDraw, ImageFont

from shortv_llava.chat.prompts import CAPTION_PROMPT
from shortv_llava.examples.shapes_llava.shapes import (
    COLORS,
    SHAPES,
    ColoredShape,
    Question,
    article,
    different,
    outline,
    plural,
)

IMAGE_SIZE = 128  # pixels
GRID = 4
CELL = IMAGE_SIZE // GRID
RADII = {"small": 8.5, "large": 14.0}  # pixels
PATTERNS = ("plain", "dotted")  # a white dot in the middle
VALUES = {"size": tuple(RADII), "pattern": PATTERNS, "color": tuple(COLORS), "shape": SHAPES}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("existence", "color", "shape", "size", "pattern", "count", "position", "relation", "comparison")
NUMBER = "number"  # the kind of question that is about a written number
NUMBERS = 2  # in a picture, where there are any
ORDINALS = ("first", "second", "third")
DIGIT = 16  # pixels from one digit of a number to the next
MAX_OBJECTS = 6


def quadrant(cell: int) -> str:
    """Where in the picture a cell lies."""
    row, column = divmod(cell, GRID)
    return QUADRANTS[row // 2 * 2 + column // 2]


@dataclass(frozen=True)
class Thing(ColoredShape):
    size: str
    pattern: str

    @property
    def place(self) -> tuple[int, int]:
        """Row and column."""
        return divmod(self.cell, GRID)

    @property
    def quadrant(self) -> str:
        return quadrant(self.cell)

    @property
    def words(self) -> tuple[str, ...]:
        """All words that describe it: its attributes and its quadrant."""
        return (*(getattr(self, attribute) for attribute in VALUES), *self.quadrant.split())


@dataclass(frozen=True)
class Number:
    """A number to read, across its cell and the next."""

    digits: str
    color: str
    cell: int
    left: int  # pixels, in its cell

    def column(self, index: int) -> int:
        """Left edge of a digit in the picture, pixels."""
        return self.cell % GRID * CELL + self.left + index * DIGIT


@dataclass(frozen=True)
class Scene:
    objects: tuple[Thing, ...]  # in reading order
    background: tuple[int, int, int]
    numbers: tuple[Number, ...] = ()

    def count(self, wanted: dict[str, str]) -> int:
        """How many objects have these values of attributes."""
        return sum(all(getattr(item, name) == value for name, value in wanted.items()) for item in self.objects)


def make_numbers(rng: random.Random, number: int) -> tuple[Number, ...]:
    """Draw numbers of different colours, each in a row of its own."""
    found = []
    for row, color in zip(rng.sample(range(GRID), number), rng.sample(VALUES["color"], number)):
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, len(ORDINALS))))
        left = rng.randint(0, 2 * CELL // DIGIT - len(digits)) * DIGIT
        found.append(Number(digits, color, row * GRID + rng.randrange(GRID - 1), left))
    return tuple(found)


def make_scene(rng: random.Random, objects: int | None = None, numbers: int = 0) -> Scene:
    """Draw a scene with `objects` objects, by default one to six, and `numbers` written numbers.

    Colours and shapes come from a pool of three each, so that objects share one of them; no two objects share both.
    """
    colors, shapes = rng.sample(VALUES["color"], 3), rng.sample(SHAPES, 3)
    pairs = [(color, shape) for color in colors for shape in shapes]
    number = objects or rng.randint(1, MAX_OBJECTS)
    written = make_numbers(rng, numbers)
    taken = {item.cell + turn for item in written for turn in (0, 1)}
    free = [cell for cell in range(GRID**2) if cell not in taken]
    found = []
    for cell, (color, shape) in zip(sorted(rng.sample(free, number)), rng.sample(pairs, number)):
        row, column = divmod(cell, GRID)
        center = tuple((index + 0.5) * CELL + rng.uniform(-1.5, 1.5) for index in (column, row))
        size = rng.choice(VALUES["size"])
        radius = RADII[size] * rng.uniform(0.95, 1.05)
        found.append(Thing(color, shape, cell, center, radius, size, rng.choice(PATTERNS)))
    gray = rng.randint(205, 235)
    return Scene(tuple(found), (gray, gray, gray), written)


def draw(scene: Scene) -> Image.Image:
    """The picture, IMAGE_SIZE pixels square, RGB."""
    scale = 2  # drawn larger and reduced, for smooth edges
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), scene.background)
    canvas = ImageDraw.Draw(image)

    def disc(center: tuple[float, float], radius: float, fill: tuple[int, int, int]) -> None:
        x, y = center
        canvas.ellipse([value * scale for value in (x - radius, y - radius, x + radius, y + radius)], fill=fill)

    for item in scene.objects:
        if item.shape == "circle":
            disc(item.center, item.radius, COLORS[item.color])
        else:
            canvas.polygon([(x * scale, y * scale) for x, y in outline(item)], fill=COLORS[item.color])
        if item.pattern == "dotted":
            disc(item.center, 0.27 * item.radius, (255, 255, 255))
    font = ImageFont.load_default(size=1.4 * DIGIT * scale)
    for item in scene.numbers:
        for index, digit in enumerate(item.digits):
            middle = item.column(index) + DIGIT / 2, (item.cell // GRID + 0.5) * CELL
            place = tuple(value * scale for value in middle)
            canvas.text(place, digit, fill=COLORS[item.color], font=font, anchor="mm")
    return image.reduce(scale)


def phrase(wanted: dict[str, str], many: bool = False) -> str:
    """A phrase such as `small dotted red circle(s)` of the values, in that order; `object(s)` without a shape."""
    noun = wanted.get("shape", "object")
    adjectives = [wanted[name] for name in ("size", "pattern", "color") if name in wanted]
    return " ".join([*adjectives, plural(noun) if many else noun])


def _values(item: Thing, attributes: Sequence[str]) -> dict[str, str]:
    return {name: getattr(item, name) for name in attributes}


def _reference(scene: Scene, item: Thing, rng: random.Random, without: str = "") -> str | None:
    """A phrase that identifies this object with as few attributes as possible, or None if there is none."""
    attributes = [name for name in VALUES if name != without]
    for number in range(1, len(attributes) + 1):
        unique = [chosen for chosen in combinations(attributes, number) if scene.count(_values(item, chosen)) == 1]
        if unique:
            return phrase(_values(item, rng.choice(unique)))
    return None


def ask_existence(scene: Scene, rng: random.Random) -> Question:
    """A question about existence. Half of the absent objects differ from a present one in a single attribute."""
    wanted = _values(rng.choice(scene.objects), rng.sample(list(VALUES), rng.randint(1, 3)))
    if rng.random() < 0.5:
        while scene.count(wanted):
            names = [rng.choice(list(wanted))] if rng.random() < 0.5 else list(wanted)
            wanted |= {name: rng.choice(VALUES[name]) for name in names}
            if rng.random() < 0.1:  # only colour and shape, for any size and pattern
                wanted = {name: rng.choice(VALUES[name]) for name in ("color", "shape")}
    name = phrase(wanted)
    return Question("existence", f"Is there {article(name)} {name}?", "yes" if scene.count(wanted) else "no")


def ask_attribute(scene: Scene, rng: random.Random, kind: str) -> Question | None:
    item = rng.choice(scene.objects)
    reference = _reference(scene, item, rng, without=kind)
    if reference is None:
        return None
    text = {
        "color": f"What color is the {reference}?",
        "shape": f"What shape is the {reference}?",
        "size": f"Is the {reference} small or large?",
        "pattern": f"Is the {reference} plain or dotted?",
    }[kind]
    return Question(kind, text, getattr(item, kind))


def ask_count(scene: Scene, rng: random.Random) -> Question:
    wanted = _values(rng.choice(scene.objects), rng.sample(list(VALUES), rng.choice((0, 1, 1, 1, 2))))
    if wanted and rng.random() < 0.15:
        wanted = {name: rng.choice(VALUES[name]) for name in wanted}
    return Question("count", f"How many {phrase(wanted, many=True)} are there?", str(scene.count(wanted)))


def ask_position(scene: Scene, rng: random.Random) -> Question:
    item = rng.choice(scene.objects)
    return Question("position", f"Where is the {_reference(scene, item, rng)}?", item.quadrant)


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(scene.objects, 2)
    axes = [axis for axis in (0, 1) if first.place[axis] != second.place[axis]]
    axis = rng.choice(axes)
    is_before = rng.random() < 0.5
    relation = (("below", "above"), ("right of", "left of"))[axis][is_before]
    names = [_reference(scene, item, rng) for item in (first, second)]
    true = (first.place[axis] < second.place[axis]) == is_before
    return Question("relation", f"Is the {names[0]} {relation} the {names[1]}?", "yes" if true else "no")


def ask_comparison(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.objects) < 2:
        return None
    attribute = rng.choice(list(VALUES))
    present = sorted({getattr(item, attribute) for item in scene.objects})
    first = rng.choice(present)
    second = rng.choice([value for value in VALUES[attribute] if value != first])
    if len(present) > 1 and rng.random() < 0.8:
        second = rng.choice([value for value in present if value != first])
    if rng.random() < 0.5:
        first, second = second, first
    names = [phrase({attribute: value}, many=True) for value in (first, second)]
    more = scene.count({attribute: first}) > scene.count({attribute: second})
    return Question("comparison", f"Are there more {names[0]} than {names[1]}?", "yes" if more else "no")


ASK: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "existence": ask_existence,
    **{kind: lambda scene, rng, kind=kind: ask_attribute(scene, rng, kind) for kind in VALUES},
    "count": ask_count,
    "position": ask_position,
    "relation": ask_relation,
    "comparison": ask_comparison,
}


def caption(scene: Scene) -> Question:
    """All objects in reading order, without their patterns."""
    names = [phrase(_values(item, ("size", "color", "shape"))) for item in scene.objects]
    names = [f"{article(name)} {name}" for name in names]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return Question("caption", CAPTION_PROMPT, listed.capitalize() + ".")


def ask_several(scene: Scene, number: int, rng: random.Random) -> list[Question]:
    """`number` different questions, or as many as the scene allows.

    One about each written number, then the kinds in turn from a random one on.
    """
    written = [Question(NUMBER, f"What is the {item.color} number?", item.digits) for item in scene.numbers]
    first = rng.randrange(len(KINDS))
    others = (ASK[KINDS[(first + turn) % len(KINDS)]](scene, rng) for turn in range(5 * number))
    return different(chain(written, others), number)


def held_out(
    pictures: int, questions: int, seed: str = "held-out", objects: int | None = None, numbers: int = 0
) -> list[tuple[Scene, list[Question]]]:
    """Pictures with `questions` short-answer questions about each. Training draws from other seeds.

    Args:
        objects: number of objects in every picture; by default one to six.
        numbers: number of written numbers in every picture.
    """
    found = []
    for index in range(pictures):
        rng = random.Random(f"{seed}/{index}")
        asked: list[Question] = []
        while len(asked) < questions:  # some scenes do not allow so many
            scene = make_scene(rng, objects, numbers)
            asked = ask_several(scene, questions, rng)
        found.append((scene, asked))
    return found
