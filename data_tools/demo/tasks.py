"""The mix of the demo set and the examples of each of its parts."""

import itertools
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from . import clip_tasks, picture_tasks, text_tasks
from .example import Example, Split, Task, make_in_split
from .pictures import COLOURS, SHAPES

_WAYS_TO_SUM = {  # sum of two terms -> in how many ways it comes about
    total: sum(1 for a in range(1, text_tasks.MAX_TERM + 1) if 1 <= total - a <= text_tasks.MAX_TERM)
    for total in range(2, 2 * text_tasks.MAX_TERM + 1)
}
_BOXES = picture_tasks.grid_boxes()
_BOXES_PER_CENTRE = max(
    sum(1 for b in _BOXES if (b[0] + b[2], b[1] + b[3]) == centre) for centre in {(b[0] + b[2], b[1] + b[3]) for b in _BOXES}
)

TASKS = (
    Task("colour", 10, picture_tasks.colour, tuple(COLOURS), 1 / len(COLOURS)),
    Task("shape", 22, picture_tasks.shape, SHAPES, 1 / len(SHAPES)),
    Task("count", 12, picture_tasks.count, tuple(range(1, picture_tasks.MAX_COUNT + 1)), 1 / picture_tasks.MAX_COUNT),
    Task("box", 2, picture_tasks.box, _BOXES, 1 / len(_BOXES)),
    Task("point", 2, picture_tasks.point, _BOXES, _BOXES_PER_CENTRE / len(_BOXES)),
    Task(
        "read",
        4,
        picture_tasks.read,
        tuple(range(1, picture_tasks.MAX_LETTERS + 1)),
        1 / (picture_tasks.MAX_LETTERS * len(picture_tasks.LETTERS)),
    ),
    Task("order", 16, clip_tasks.order, clip_tasks.ORDER_CHOICES, 1 / len(clip_tasks.CLIP_COLOURS)),
    Task("time", 2, clip_tasks.time, clip_tasks.TIME_CHOICES, 1 / 2),  # the slow frame after a cut gives its time away
    Task("motion", 5, clip_tasks.motion, tuple(clip_tasks.DIRECTIONS), 1 / len(clip_tasks.DIRECTIONS)),
    Task("copy", 2, text_tasks.copy, chance=0.0),
    Task("add", 2, text_tasks.add, chance=max(_WAYS_TO_SUM.values()) / text_tasks.MAX_TERM**2),
    Task("fact", 2, text_tasks.fact, chance=1 / len(COLOURS)),
    Task("story", 8, clip_tasks.story, clip_tasks.ORDER_CHOICES),
    Task("caption", 5, text_tasks.caption),
    Task("album", 3, text_tasks.album, (2, 3)),
    Task("sentences", 3, text_tasks.sentences),
)


class Numbered(NamedTuple):
    """The `number`-th example of a task in one part of a set."""

    task: str
    number: int
    example: Example


def allocate(num_examples: int) -> dict[str, int]:
    """Examples per task: by weight, remainders to the largest fractions, `num_examples` in all."""
    total = sum(task.weight for task in TASKS)
    counts = {task.name: num_examples * task.weight // total for task in TASKS}
    by_remainder = sorted(TASKS, key=lambda task: -(num_examples * task.weight % total))
    for task in by_remainder[: num_examples - sum(counts.values())]:
        counts[task.name] += 1
    return counts


def examples(split: Split, num_examples: int, seed: int) -> list[Numbered]:
    """All examples of one part of a set, tasks mixed. Each depends on (seed, split, task, number) alone."""
    counts = allocate(num_examples)
    made = [
        Numbered(task.name, number, make_in_split(task, split, Random(f"{seed}/{split}/{task.name}/{number}"), choice))
        for task in TASKS
        for number, choice in enumerate(itertools.islice(_balanced(task, split, seed), counts[task.name]))
    ]
    Random(f"{seed}/{split}/order").shuffle(made)
    return made


def _balanced(task: Task, split: Split, seed: int) -> Iterator:
    """The task's choices again and again, each round in another order."""
    rng = Random(f"{seed}/{split}/{task.name}/choices")
    while True:
        yield from rng.sample(task.choices, len(task.choices))
