"""Questions about one picture: colour, shape, number, place, text. Choices are drawn by the caller, everything else here."""

from random import Random

from .example import Example
from .pictures import COLOURS, Box, Lettering, Scene, text_width_px
from .sampling import GREY, any_colour, any_shape, background, big_shape, canvas, framed_shape, item, shade, square_box

MAX_COUNT = 5
GRID = 10
"""Grounded boxes lie on a grid of tenths, so that their numbers in [0, 1000] are exact multiples of 100."""
LETTERS = "ACEHKLNRTXZ4"
MAX_LETTERS = 4

COLOUR_QUESTIONS = ("What colour is the shape?", "Which colour is this?", "Name the colour.")
SHAPE_QUESTIONS = ("What shape is this?", "Name the shape.", "Which shape do you see?")
COUNT_QUESTIONS = ("How many dots are there?", "Count the dots.")
READ_QUESTIONS = ("What does the picture say?", "Read the text.")
BOX_QUESTIONS = ("Where is the {colour} shape? Give its box.", "Box of the {colour} shape:")
POINT_QUESTIONS = ("Where is the {colour} shape? Give its centre.", "Centre of the {colour} shape:")


def grid_boxes() -> tuple[Box, ...]:
    """Every box of 2 or 4 tenths a side; even sides put the centre on the grid too."""
    return tuple(
        (x, y, x + side_x, y + side_y)
        for side_x in (2, 4)
        for side_y in (2, 4)
        for x in range(GRID + 1 - side_x)
        for y in range(GRID + 1 - side_y)
    )


def colour(rng: Random, choice: str) -> Example:
    return Example((big_shape(rng, any_shape(rng), choice), rng.choice(COLOUR_QUESTIONS)), choice)


def shape(rng: Random, choice: str) -> Example:
    return Example((framed_shape(rng, choice, any_colour(rng)), rng.choice(SHAPE_QUESTIONS)), choice)


def count(rng: Random, choice: int) -> Example:
    """`choice` equal dots apart from each other. Their size does not depend on their number."""
    width, height = canvas(rng)
    side_px = min(round((width * height) ** 0.5 * rng.uniform(0.19, 0.23)), min(width, height) * 2 // 5)
    paint = any_colour(rng)
    boxes = _apart(rng, width, height, side_px, choice)
    scene = Scene(width, height, GREY, tuple(item(rng, "circle", paint, box) for box in boxes))
    return Example((scene, rng.choice(COUNT_QUESTIONS)), str(choice))


def box(rng: Random, choice: Box) -> Example:
    """Answer: the box in the report's notation, corners in thousandths of width and height."""
    scene, paint = _grounded_scene(rng, choice)
    corners = ", ".join(str(value * 1000 // GRID) for value in choice)
    return Example((scene, rng.choice(BOX_QUESTIONS).format(colour=paint)), f"<|box_start|>[[{corners}]]<|box_end|>")


def point(rng: Random, choice: Box) -> Example:
    """Answer: the centre of the shape, in the report's notation."""
    scene, paint = _grounded_scene(rng, choice)
    x1, y1, x2, y2 = choice
    centre = f"{(x1 + x2) * 500 // GRID}, {(y1 + y2) * 500 // GRID}"
    return Example((scene, rng.choice(POINT_QUESTIONS).format(colour=paint)), f"<|point_start|>[[{centre}]]<|point_end|>")


def read(rng: Random, choice: int) -> Example:
    """`choice` letters in a size that lets the longest text fit, dark on light or light on dark."""
    text = "".join(rng.choice(LETTERS) for _ in range(choice))
    width, height = canvas(rng)
    if width < height:
        width, height = height, width
    size_px = round(min(height * 0.8, width / 3.2) * rng.uniform(0.8, 1.0))
    half_width_px, half_height_px = text_width_px(text, size_px) // 2 + 2, size_px * 2 // 5
    x = rng.randint(half_width_px, max(half_width_px, width - half_width_px))
    y = rng.randint(half_height_px, max(half_height_px, height - half_height_px))
    ink, paper = rng.choice((("black", "white"), ("white", "black"), ("blue", "white"), ("black", "yellow")))
    lettering = Lettering(text, shade(rng, ink), size_px, x, y)
    return Example((Scene(width, height, shade(rng, paper), (lettering,)), rng.choice(READ_QUESTIONS)), text)


def _grounded_scene(rng: Random, target: Box) -> tuple[Scene, str]:
    """A scene with a shape in the `target` box (in tenths), half the time beside another colour, and the target's colour."""
    width, height = canvas(rng, multiple_px=GRID)
    paint, other = rng.sample(tuple(COLOURS), 2)
    items = [item(rng, any_shape(rng), paint, _to_pixels(target, width, height))]
    free = [b for b in grid_boxes() if not _overlap(b, target)]
    if free and rng.random() < 0.5:
        items.insert(rng.randrange(2), item(rng, any_shape(rng), other, _to_pixels(rng.choice(free), width, height)))
    return Scene(width, height, background(rng), tuple(items)), paint


def _to_pixels(grid_box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = grid_box
    return x1 * width // GRID, y1 * height // GRID, x2 * width // GRID, y2 * height // GRID


def _apart(rng: Random, width: int, height: int, side_px: int, number: int) -> list[Box]:
    """`number` boxes that do not touch. Starts over when the first ones leave no room."""
    while True:
        boxes: list[Box] = []
        for _ in range(50):
            candidate = square_box(rng, width, height, side_px)
            x1, y1, x2, y2 = candidate
            if not any(_overlap((x1 - 3, y1 - 3, x2 + 3, y2 + 3), placed) for placed in boxes):
                boxes.append(candidate)
            if len(boxes) == number:
                return boxes


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
