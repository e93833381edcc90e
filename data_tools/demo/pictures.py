"""Scenes: coloured shapes and lettering on a plain background, drawn with Pillow."""

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""(x1, y1, x2, y2) in pixels; x2 and y2 are the first column and row outside."""

COLOURS: dict[str, RGB] = {
    "red": (220, 30, 30),
    "green": (20, 160, 40),
    "blue": (30, 50, 220),
    "yellow": (240, 220, 20),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")


@dataclass(frozen=True, slots=True)
class Item:
    """A shape that fills `box` and touches all four of its sides."""

    shape: str
    colour: str
    rgb: RGB
    box: Box


@dataclass(frozen=True, slots=True)
class Lettering:
    """Text whose ink is centred on (x, y)."""

    text: str
    rgb: RGB
    size_px: int
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture, `width` x `height` pixels."""

    width: int
    height: int
    background: RGB
    items: tuple[Item | Lettering, ...]


def draw(scene: Scene, oversampling: int = 4) -> Image.Image:
    """The scene as an RGB image. Edges are smoothed by drawing at `oversampling` times the size."""
    image = Image.new("RGB", (scene.width * oversampling, scene.height * oversampling), scene.background)
    canvas = ImageDraw.Draw(image)
    for item in scene.items:
        if isinstance(item, Lettering):
            font = _font(item.size_px * oversampling)
            canvas.text((item.x * oversampling, item.y * oversampling), item.text, fill=item.rgb, font=font, anchor="mm")
        else:
            _draw_shape(canvas, item, oversampling)
    return image if oversampling == 1 else image.resize((scene.width, scene.height), Image.Resampling.BOX)


def text_width_px(text: str, size_px: int) -> int:
    """Width of `text` in the bundled font."""
    return round(_font(size_px).getlength(text))


def _draw_shape(canvas: ImageDraw.ImageDraw, item: Item, scale: int) -> None:
    x1, y1, x2, y2 = (value * scale for value in item.box)
    x2, y2 = x2 - 1, y2 - 1  # Pillow paints the last row and column too
    if item.shape == "circle":
        canvas.ellipse((x1, y1, x2, y2), fill=item.rgb)
    elif item.shape == "square":
        canvas.rectangle((x1, y1, x2, y2), fill=item.rgb)
    elif item.shape == "triangle":
        canvas.polygon([((x1 + x2) // 2, y1), (x2, y2), (x1, y2)], fill=item.rgb)
    elif item.shape == "cross":
        third_x, third_y = (x2 - x1) // 3, (y2 - y1) // 3
        canvas.rectangle((x1 + third_x, y1, x2 - third_x, y2), fill=item.rgb)
        canvas.rectangle((x1, y1 + third_y, x2, y2 - third_y), fill=item.rgb)
    else:
        raise ValueError(f"unknown shape {item.shape!r}; expected one of {', '.join(SHAPES)}")


@lru_cache(maxsize=256)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size_px)
