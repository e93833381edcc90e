"""Random canvases, colours and boxes. Nothing here depends on an answer, so nothing here can give one away."""

from random import Random

from .pictures import COLOURS, RGB, SHAPES, Box, Item, Scene

BACKGROUNDS: tuple[RGB, ...] = ((128, 128, 128), (150, 130, 110), (110, 130, 150), (122, 142, 122), (145, 122, 142))
GREY: RGB = (128, 128, 128)
TOKEN_PIXELS = 28
MIN_SIDE_PX, MAX_SIDE_PX = 84, 336
MIN_PICTURE_TOKENS, MAX_PICTURE_TOKENS = 9, 36


def canvas(rng: Random, multiple_px: int = 1) -> tuple[int, int]:
    """(width, height) of a picture of 9 to 36 visual tokens, at any aspect ratio that the sides allow."""
    while True:
        width, height = (rng.randrange(MIN_SIDE_PX, MAX_SIDE_PX + 1) // multiple_px * multiple_px for _ in range(2))
        num_tokens = round(width / TOKEN_PIXELS) * round(height / TOKEN_PIXELS)
        if min(width, height) >= MIN_SIDE_PX and MIN_PICTURE_TOKENS <= num_tokens <= MAX_PICTURE_TOKENS:
            return width, height


def shade(rng: Random, colour: str) -> RGB:
    """A shade of the named colour that nobody would call by another name."""
    red, green, blue = (min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[colour])
    return red, green, blue


def background(rng: Random) -> RGB:
    return rng.choice(BACKGROUNDS)


def item(rng: Random, shape: str, colour: str, box: Box) -> Item:
    return Item(shape, colour, shade(rng, colour), box)


def square_box(rng: Random, width: int, height: int, side_px: int) -> Box:
    """A square of `side_px` anywhere in width x height."""
    x, y = rng.randint(0, width - side_px), rng.randint(0, height - side_px)
    return x, y, x + side_px, y + side_px


def big_shape(rng: Random, shape: str, colour: str) -> Scene:
    """One shape over 55 to 90 % of the shorter side."""
    width, height = canvas(rng)
    side_px = round(min(width, height) * rng.uniform(0.55, 0.9))
    return Scene(width, height, background(rng), (item(rng, shape, colour, square_box(rng, width, height, side_px)),))


def framed_shape(rng: Random, shape: str, colour: str) -> Scene:
    """One shape over 80 to 100 % of the shorter side of a nearly square grey picture.

    A fresh vision transformer learns to tell shapes apart several times faster when they fill the picture: its position table is
    stretched over every picture, so that the same corner stays free of a triangle at all sizes.
    """
    width, height = canvas(rng)
    while not 3 / 4 < width / height < 4 / 3:
        width, height = canvas(rng)
    side_px = round(min(width, height) * rng.uniform(0.8, 1.0))
    return Scene(width, height, GREY, (item(rng, shape, colour, square_box(rng, width, height, side_px)),))


def any_shape(rng: Random) -> str:
    return rng.choice(SHAPES)


def any_colour(rng: Random) -> str:
    return rng.choice(tuple(COLOURS))
