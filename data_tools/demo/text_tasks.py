"""Plain text questions, and documents: captions, pictures between sentences, plain sentences."""

from random import Random

from .example import Example
from .pictures import COLOURS, SHAPES
from .sampling import any_colour, any_shape, framed_shape

THINGS = {
    "a lemon": "yellow",
    "a banana": "yellow",
    "grass": "green",
    "a frog": "green",
    "the sky": "blue",
    "the sea": "blue",
    "blood": "red",
    "a tomato": "red",
    "snow": "white",
    "milk": "white",
    "coal": "black",
    "the night": "black",
}
FACT_QUESTIONS = (
    "What colour is {thing}?",
    "Which colour does {thing} have?",
    "Name the colour of {thing}.",
    "The colour of {thing}?",
    "Tell me the colour of {thing}.",
)
OPPOSITES = (("left", "right"), ("up", "down"), ("first", "last"), ("black", "white"), ("light", "dark"), ("day", "night"))
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

LETTERS = "ABCDEFGHKLMNPRSTUXYZ"
MAX_TERM = 9
COPY_QUESTIONS = ("Repeat: {text}", "Copy this: {text}", "Say {text}")
SUM_QUESTIONS = ("What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.")


def copy(rng: Random, _: None) -> Example:
    text = " ".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 4)))
    return Example((rng.choice(COPY_QUESTIONS).format(text=text),), text)


def add(rng: Random, _: None) -> Example:
    a, b = rng.randint(1, MAX_TERM), rng.randint(1, MAX_TERM)
    return Example((rng.choice(SUM_QUESTIONS).format(a=a, b=b),), str(a + b))


def fact(rng: Random, _: None) -> Example:
    thing = rng.choice(tuple(THINGS))
    return Example((rng.choice(FACT_QUESTIONS).format(thing=thing),), THINGS[thing])


def caption(rng: Random, _: None) -> Example:
    """A picture and what it shows."""
    shape, colour = any_shape(rng), any_colour(rng)
    return Example((framed_shape(rng, shape, colour), _sentence(f"a {colour} {shape}")))


def album(rng: Random, number: int) -> Example:
    """`number` pictures between the sentences that describe them."""
    parts: list = [f"Here are {NUMBERS[number - 1]} pictures."]
    for i in range(number):
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        ending = " That is all." if i == number - 1 else " Next picture:"
        parts += [framed_shape(rng, shape, colour), _sentence(f"a {colour} {shape}") + ending]
    return Example(tuple(parts))


def sentences(rng: Random, _: None) -> Example:
    """Three or four sentences of general knowledge."""
    makers = (_thing_sentence, _opposite_sentence, _counting_sentence)
    return Example((" ".join(rng.choice(makers)(rng) for _ in range(rng.randint(3, 4))),))


def _thing_sentence(rng: Random) -> str:
    thing = rng.choice(tuple(THINGS))
    return _sentence(f"{thing} is {THINGS[thing]}")


def _opposite_sentence(rng: Random) -> str:
    a, b = rng.sample(rng.choice(OPPOSITES), 2)
    return _sentence(f"the opposite of {a} is {b}")


def _counting_sentence(rng: Random) -> str:
    start = rng.randrange(len(NUMBERS) - 3)
    return _sentence("after {} come {}, {} and {}".format(*NUMBERS[start : start + 4]))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
