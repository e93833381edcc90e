"""Questions about one clip: which colour comes first, when, and which way a shape moves.

Cuts that also change the background leave few similar blocks, so the frame after them is slow; cuts of the shape alone and slow
drifts keep most of the picture, so the frames after them are fast. That shows where a cut is, and nothing of the colours and directions.
"""

from itertools import permutations
from random import Random

from .clips import Clip, Shot
from .example import Example
from .pictures import RGB, Box, Item
from .sampling import any_shape, item, square_box

CLIP_COLOURS = ("red", "green", "blue", "yellow")
LIGHT: RGB = (175, 175, 175)
DARK: RGB = (10, 62, 66)
"""A saturated dark background: in hue, saturation and value it points elsewhere than the light grey one."""
SIDES_PX = range(112, 141, 2)
FRAME_RATES = (8, 10, 12, 16, 24)
GOPS_FRAMES = (12, 24, 48)
DURATIONS_S = (2.0, 2.5)
TIMED_DURATION_S = 2.5
CUT_TIMES_S = (0.5, 1.0, 1.5, 2.0)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

ORDER_CHOICES = tuple(permutations(CLIP_COLOURS, 2))
TIME_CHOICES = tuple((cut_s, part) for cut_s in CUT_TIMES_S for part in (0, 1))

ORDER_QUESTIONS = ("Which colour comes first?", "Name the first colour.")
TIME_QUESTIONS = ("When is the shape {colour}?", "Give the time of the {colour} shape.")
MOTION_QUESTIONS = ("Which way does the shape move?", "Name the direction of the motion.")


def order(rng: Random, choice: tuple[str, str]) -> Example:
    """Two colours one after the other; asked is the first. Who sees both and not their order is right half of the time."""
    return Example((_two_colours_of_any_length(rng, *choice), rng.choice(ORDER_QUESTIONS)), choice[0])


def story(rng: Random, choice: tuple[str, str]) -> Example:
    """A document: a clip and what happens in it."""
    first, second = choice
    return Example((_two_colours_of_any_length(rng, first, second), f"First {first}, then {second}."))


def time(rng: Random, choice: tuple[float, int]) -> Example:
    """When one of two colours is seen, in seconds, in the report's notation."""
    cut_s, part = choice
    colours = rng.sample(CLIP_COLOURS, 2)
    clip = _two_colours(rng, *colours, TIMED_DURATION_S, cut_s)
    start_s, end_s = ((0.0, cut_s), (cut_s, TIMED_DURATION_S))[part]
    answer = f"<|clip_time_start|>[{start_s:.1f}, {end_s:.1f}]<|clip_time_end|>"
    return Example((clip, rng.choice(TIME_QUESTIONS).format(colour=colours[part])), answer)


def motion(rng: Random, choice: str) -> Example:
    """A shape moves along one axis, as far as the shorter side allows."""
    width, height = rng.choice(SIDES_PX), rng.choice(SIDES_PX)
    duration_s, rate = rng.choice(DURATIONS_S), rng.choice(FRAME_RATES)
    side_px = round(min(width, height) * rng.uniform(0.35, 0.5))
    x1, y1, _, _ = square_box(rng, width, height, side_px)
    distance_px = (min(width, height) - side_px) * rng.uniform(0.8, 1.0)  # the same along both axes, as slow frames tell it
    dx, dy = (direction * distance_px for direction in DIRECTIONS[choice])
    x1 = _start(rng, dx, width - side_px) if dx else x1
    y1 = _start(rng, dy, height - side_px) if dy else y1
    moving = item(rng, any_shape(rng), rng.choice(CLIP_COLOURS), (x1, y1, x1 + side_px, y1 + side_px))
    shot = Shot(round(duration_s * rate), rng.choice((LIGHT, DARK)), (moving,), (dx / duration_s, dy / duration_s))
    return Example((Clip(width, height, rate, rng.choice(GOPS_FRAMES), (shot,)), rng.choice(MOTION_QUESTIONS)), choice)


def _start(rng: Random, distance_px: float, room_px: int) -> int:
    """Where a shape starts that must travel `distance_px` (signed) within 0 .. room_px."""
    slack_px = int(room_px - abs(distance_px))
    return rng.randint(0, slack_px) if distance_px > 0 else room_px - rng.randint(0, slack_px)


def _two_colours_of_any_length(rng: Random, first: str, second: str) -> Clip:
    duration_s = rng.choice(DURATIONS_S)
    return _two_colours(rng, first, second, duration_s, rng.uniform(0.8, duration_s - 0.8))


def _two_colours(rng: Random, first: str, second: str, duration_s: float, cut_s: float) -> Clip:
    """Two shots with the cut at `cut_s`; half of the time the background is cut too."""
    width, height = rng.choice(SIDES_PX), rng.choice(SIDES_PX)
    rate = rng.choice(FRAME_RATES)
    ground = rng.choice((LIGHT, DARK))
    other_ground = rng.choice((LIGHT, DARK))
    shots = (
        _shot(rng, first, width, height, round(cut_s * rate), ground),
        _shot(rng, second, width, height, round(duration_s * rate), other_ground),
    )
    return Clip(width, height, rate, rng.choice(GOPS_FRAMES), shots)


def _shot(rng: Random, colour: str, width: int, height: int, end: int, ground: RGB) -> Shot:
    """A big shape that drifts by a few pixels a second, in and out of slow motion."""
    side_px = round(min(width, height) * rng.uniform(0.6, 0.85))
    drifting: Item = item(rng, any_shape(rng), colour, _inner_box(rng, width, height, side_px))
    return Shot(end, ground, (drifting,), (rng.choice((-4.0, 0.0, 4.0)), rng.choice((-4.0, 0.0, 4.0))))


def _inner_box(rng: Random, width: int, height: int, side_px: int) -> Box:
    """A square at least 8 pixels from every side, less where there is no room."""
    margin_px = min(8, (min(width, height) - side_px) // 2)
    x1, y1, x2, y2 = square_box(rng, width - 2 * margin_px, height - 2 * margin_px, side_px)
    return x1 + margin_px, y1 + margin_px, x2 + margin_px, y2 + margin_px
