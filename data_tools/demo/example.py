"""What an example is before it becomes files, and which part of the set it may belong to."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any, Literal

from .clips import Clip
from .pictures import Scene

Split = Literal["train", "valid"]
Part = str | Scene | Clip
VALID_SHARE = Fraction(1, 8)
"""Share of all possible contents that is held out."""


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its exact answer, or, where `answer` is None, a document that is learnt as it stands."""

    parts: tuple[Part, ...]
    answer: str | None = None

    def content_keys(self) -> tuple[str, ...]:
        """What must not appear both in training and in the held-out part: every picture and clip, or, without any, the text."""
        media = tuple(repr(part) for part in self.parts if not isinstance(part, str))
        return media or ("".join(part for part in self.parts if isinstance(part, str)),)


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of question.

    `make(rng, choice)` returns an example; `choices` are taken in turn, so that every answer is equally frequent. `chance` is the
    accuracy of the best guess by someone who reads the question and sees nothing, None for documents.
    """

    name: str
    weight: int
    make: Callable[[Random, Any], Example]
    choices: tuple[Any, ...] = (None,)
    chance: float | None = None


def split_of(key: str) -> Split:
    """The part that a content belongs to: the same in every set that is ever made."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return "valid" if number < VALID_SHARE * 2**64 else "train"


def make_in_split(task: Task, split: Split, rng: Random, choice: Any) -> Example:
    """Draw examples until all contents of one belong to `split`."""
    while True:
        example = task.make(rng, choice)
        if all(split_of(key) == split for key in example.content_keys()):
            return example
