"""Synthetic pictures of coloured shapes, with questions and captions: the data of the embedded checkpoint.

A picture is a 3 x 3 grid of cells with one to three shapes, each in a separate cell, a little off centre. All random
choices use the given `random.Random`, so a seed determines a picture and its questions.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw

IMAGE_SIZE = 96  # pixels
CELL = IMAGE_SIZE // 3
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 215, 30),
    "purple": (140, 60, 190),
    "orange": (250, 130, 15),
    "black": (20, 20, 20),
    "cyan": (30, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
WORDS = (*COLORS, *SHAPES, "top", "bottom", "left", "right", "center")  # answers that name what a patch shows
KINDS = ("existence", "color", "shape", "count", "position")
MAX_OBJECTS = 3


@dataclass(frozen=True)
class ColoredShape:
    color: str
    shape: str
    cell: int  # index into POSITIONS
    center: tuple[float, float]  # pixels
    radius: float  # pixels

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def words(self) -> list[str]:
        """All words that describe it: colour, shape and position."""
        return [self.color, self.shape, *POSITIONS[self.cell].split()]


@dataclass(frozen=True)
class Scene:
    objects: tuple[ColoredShape, ...]  # in reading order
    background: tuple[int, int, int]

    def count(self, word: str) -> int:
        """How many objects have this colour or shape."""
        return sum(word in (item.color, item.shape) for item in self.objects)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def make_scene(rng: random.Random) -> Scene:
    """Draw a scene. Colours and shapes come from a pool of three each, so that counts above one are common."""
    colors, shapes = rng.sample(list(COLORS), 3), rng.sample(SHAPES, 3)
    pairs = [(color, shape) for color in colors for shape in shapes]
    number = rng.randint(1, MAX_OBJECTS)
    objects = []
    for cell, (color, shape) in zip(sorted(rng.sample(range(9), number)), rng.sample(pairs, number)):
        row, column = divmod(cell, 3)
        center = tuple((index + 0.5) * CELL + rng.uniform(-3, 3) for index in (column, row))
        objects.append(ColoredShape(color, shape, cell, center, rng.uniform(10, 12.5)))
    gray = rng.randint(215, 245)
    return Scene(tuple(objects), (gray, gray, gray))


def outline(item: ColoredShape) -> list[tuple[float, float]]:
    """Corners, pixels, of a shape other than a circle."""
    (x, y), radius = item.center, item.radius

    def around(number: int, turn: float, radii=(1.0,)) -> list[tuple[float, float]]:
        angles = [turn + 2 * math.pi * index / number for index in range(number)]
        return [
            (x + radius * radii[i % len(radii)] * math.sin(a), y - radius * radii[i % len(radii)] * math.cos(a))
            for i, a in enumerate(angles)
        ]

    if item.shape == "square":
        side = 0.85 * radius
        return [(x - side, y - side), (x + side, y - side), (x + side, y + side), (x - side, y + side)]
    if item.shape == "triangle":
        return around(3, 0.0)
    if item.shape == "star":
        return around(10, 0.0, (1.0, 0.42))
    if item.shape == "diamond":
        return [(x, y - radius), (x + 0.65 * radius, y), (x, y + radius), (x - 0.65 * radius, y)]
    arm, reach = 0.3 * radius, 0.95 * radius  # cross
    right = [(arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm), (arm, reach)]
    return [(x + dx, y + dy) for dx, dy in right + [(-dx, -dy) for dx, dy in right]]


def draw(scene: Scene) -> Image.Image:
    """The picture, IMAGE_SIZE pixels square, RGB."""
    scale = 3  # drawn larger and reduced, for smooth edges
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), scene.background)
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        if item.shape == "circle":
            (x, y), radius = item.center, item.radius
            box = [(x - radius) * scale, (y - radius) * scale, (x + radius) * scale, (y + radius) * scale]
            canvas.ellipse(box, fill=COLORS[item.color])
        else:
            canvas.polygon([(x * scale, y * scale) for x, y in outline(item)], fill=COLORS[item.color])
    return image.reduce(scale)


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _name(item: ColoredShape, about: str) -> str:
    """An object's name by its `color`, its `shape` or `both`."""
    return {"color": f"{item.color} object", "shape": item.shape, "both": item.name}[about]


def caption(scene: Scene) -> str:
    names = [f"{article(item.name)} {item.name}" for item in scene.objects]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return listed.capitalize() + "."


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of one of KINDS with a short answer, or None if the scene allows no unambiguous one."""
    item = rng.choice(scene.objects)
    if kind == "existence":
        about = rng.choice(("color", "shape", "both"))
        present = {_name(other, about) for other in scene.objects}
        if rng.random() < 0.5:
            name = _name(item, about)
        else:
            pairs = [(a.color, b.shape) for a in scene.objects for b in scene.objects]  # both present, not in one
            if about != "both" or rng.random() < 0.5:
                pairs = [(color, shape) for color in COLORS for shape in SHAPES]
            names = [_name(ColoredShape(color, shape, 0, (0, 0), 0), about) for color, shape in pairs]
            absent = [name for name in names if name not in present]
            if not absent:
                return None
            name = rng.choice(absent)
        return Question(kind, f"Is there {article(name)} {name}?", "yes" if name in present else "no")
    if kind == "color":
        return Question(kind, f"What color is the {item.shape}?", item.color) if scene.count(item.shape) == 1 else None
    if kind == "shape":
        text = f"What shape is the {item.color} object?"
        return Question(kind, text, item.shape) if scene.count(item.color) == 1 else None
    if kind == "count":
        color, shape = (
            (item.color, item.shape) if rng.random() < 0.8 else (rng.choice(list(COLORS)), rng.choice(SHAPES))
        )
        word, number = rng.choice(
            [
                ("objects", len(scene.objects)),
                (f"{color} objects", scene.count(color)),
                (plural(shape), scene.count(shape)),
            ]
        )
        return Question(kind, f"How many {word} are there?", str(number))
    if kind == "position":
        return Question(kind, f"Where is the {item.name}?", POSITIONS[item.cell])
    raise ValueError(f"unknown kind of question {kind!r}; kinds: {', '.join(KINDS)}")


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def ask_several(scene: Scene, number: int, rng: random.Random, weights=(1, 1, 1, 1, 1)) -> list[Question]:
    """`number` different questions, or as many as the scene allows, of kinds drawn at random by `weights`."""
    return different((ask(scene, rng.choices(KINDS, weights)[0], rng) for _ in range(5 * number)), number)


def different(tries: Iterable[Question | None], number: int) -> list[Question]:
    """The first `number` questions with different texts, or as many as there are."""
    asked: dict[str, Question] = {}
    for question in tries:
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == number:
            break
    return list(asked.values())


def held_out(number: int, seed: str = "held-out") -> list[tuple[Scene, Question]]:
    """`number` scenes, each with one short-answer question, the kinds in turn. Training draws from other seeds."""
    found = []
    for index in range(number):
        rng = random.Random(f"{seed}/{index}")
        question = None
        while question is None:
            scene = make_scene(rng)
            question = ask(scene, KINDS[index % len(KINDS)], rng)
        found.append((scene, question))
    return found


def write_questions(folder: Path, asked: Sequence[tuple[Any, Sequence[Question]]], draw: Callable = draw) -> None:
    """Write scenes and questions about them into a folder: LLaVA's `questions.jsonl`, with answers, and `images/`.

    Args:
        draw: makes the picture of a scene.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, questions) in enumerate(asked):
        name = f"{number:03d}.png"
        draw(scene).save(folder / "images" / name, optimize=True)
        for question in questions:
            entry = {"question_id": len(lines), "image": name, "text": question.text, "answer": question.answer}
            lines.append(json.dumps(entry | {"category": question.kind}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def main(
    folder: Annotated[Path, typer.Argument(help="For questions.jsonl and images/.")],
    pictures: int = 200,
    questions: Annotated[int, typer.Option(help="About each picture.")] = 10,
    seed: str = "held-out pictures",
) -> None:
    """Write questions never trained on, for `shortv evaluate --questions`."""
    asked = []
    while len(asked) < pictures:
        rng = random.Random(f"{seed}/{len(asked)}")
        found: list[Question] = []
        while len(found) < questions:  # some scenes do not allow so many
            scene = make_scene(rng)
            found = ask_several(scene, questions, rng)
        asked.append((scene, found))
    write_questions(folder, asked)


if __name__ == "__main__":
    typer.run(main)
