"""The questions of the demo set: disjoint parts, balanced and right answers."""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from data_tools.demo import clip_tasks, picture_tasks
from data_tools.demo.clips import Clip, scenes
from data_tools.demo.example import split_of
from data_tools.demo.pictures import COLOURS, SHAPES, Item, Scene, draw
from data_tools.demo.sampling import MAX_PICTURE_TOKENS, MIN_PICTURE_TOKENS
from data_tools.demo.tasks import TASKS, allocate, examples

NUM_TRAIN, NUM_VALID = 1200, 300


@pytest.fixture(scope="module")
def train():
    return examples("train", NUM_TRAIN, seed=0)


@pytest.fixture(scope="module")
def valid():
    return examples("valid", NUM_VALID, seed=0)


def keys_of(part):
    return {key for numbered in part for key in numbered.example.content_keys()}


def of_task(part, name):
    return [numbered.example for numbered in part if numbered.task == name]


def test_parts_share_no_content(train, valid):
    assert not keys_of(train) & keys_of(valid)


def test_parts_of_different_seeds_share_no_content(train):
    assert not keys_of(train) & keys_of(examples("valid", NUM_VALID, seed=1))


def test_every_picture_of_an_example_is_on_its_side(train, valid):
    for part, split in ((train, "train"), (valid, "valid")):
        scenes_seen = [p for numbered in part for p in numbered.example.parts if not isinstance(p, str)]
        assert {split_of(repr(scene)) for scene in scenes_seen} == {split}


def test_same_seed_same_examples_other_seed_others(train):
    assert examples("train", NUM_TRAIN, seed=0) == train
    other = examples("train", NUM_TRAIN, seed=1)
    assert len(keys_of(other) & keys_of(train)) < NUM_TRAIN / 10  # only short texts can repeat


def test_a_larger_set_contains_the_smaller_one(train):
    larger = {(task, number): example for task, number, example in examples("train", 2 * NUM_TRAIN, seed=0)}
    assert all(larger[task, number] == example for task, number, example in train)


@pytest.mark.parametrize("number", [0, 1, 7, 100, 2999, 3000])
def test_allocation_adds_up(number):
    assert sum(allocate(number).values()) == number


def test_every_question_has_one_answer(train, valid):
    """The same content and question never occur with two answers, and an answer is short and on one line."""
    answers = defaultdict(set)
    for _, _, example in train + valid:
        if example.answer is not None:
            answers[example.parts].add(example.answer)
            assert example.answer.strip() == example.answer and 0 < len(example.answer) < 64 and "\n" not in example.answer
    assert all(len(found) == 1 for found in answers.values())


@pytest.mark.parametrize("name", ["colour", "shape", "count", "motion", "time", "order"])
def test_answers_are_balanced(train, name):
    counts = Counter(example.answer for example in of_task(train, name))
    choices = next(len(task.choices) for task in TASKS if task.name == name)
    assert max(counts.values()) - min(counts.values()) <= choices / len(counts)


def test_a_blind_guess_is_no_better_than_chance(train):
    """The most frequent answer to each question text, among those with enough examples, stays near the stated chance."""
    for task in TASKS:
        found = of_task(train, task.name)
        if task.chance is None or not isinstance(found[0].parts[0], (Scene, Clip)):
            continue
        by_question = defaultdict(Counter)
        for example in found:
            by_question[example.parts[-1]][example.answer] += 1
        for counts in by_question.values():
            total = sum(counts.values())
            if total >= 40:
                spread = 4 * (task.chance * (1 - task.chance) / total) ** 0.5
                assert max(counts.values()) / total <= task.chance + spread + 0.02, task.name


def test_facts_asked_about_are_in_the_training_part(train, valid):
    learnt = {(word, e.answer) for e in of_task(train, "fact") for word in re.findall(r"\w+", e.parts[0])}
    for example in of_task(valid, "fact"):
        assert any((word, example.answer) in learnt for word in re.findall(r"\w+", example.parts[0]))


def test_pictures_keep_a_step_cheap(train):
    for _, _, example in train:
        for part in example.parts:
            if isinstance(part, Scene):
                num_tokens = round(part.width / 28) * round(part.height / 28)
                assert MIN_PICTURE_TOKENS <= num_tokens <= MAX_PICTURE_TOKENS
            if isinstance(part, Clip):
                assert 4 <= int(part.num_frames / part.frames_per_s * 2) <= 5
                assert part.width % 2 == part.height % 2 == 0


def test_native_sizes_vary(train):
    sizes = {(p.width, p.height) for _, _, e in train for p in e.parts if isinstance(p, Scene)}
    aspects = [width / height for width, height in sizes]
    assert len(sizes) > 300 and max(aspects) > 2.5 and min(aspects) < 0.4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box(shape):
    box = (31, 17, 97, 103)
    scene = Scene(140, 120, (128, 128, 128), (Item(shape, "red", COLOURS["red"], box),))
    assert _painted_box(scene, scene.items[0]) == box


@pytest.mark.parametrize("name", ["box", "point"])
def test_grounding_numbers_match_the_drawn_pixels(train, name):
    """The numbers, turned back into pixels, are the extent or the centre of the shape of the asked colour."""
    found = of_task(train, name)
    assert found
    for example in found:
        scene, question = example.parts
        numbers = [int(text) for text in re.findall(r"\d+", example.answer)]
        assert all(0 <= number <= 1000 for number in numbers)
        colour = next(word for word in re.findall(r"\w+", question) if word in COLOURS)
        (target,) = (item for item in scene.items if item.colour == colour)
        extent = _painted_box(scene, target)
        expected = extent if name == "box" else ((extent[0] + extent[2]) / 2, (extent[1] + extent[3]) / 2)
        sides = (scene.width, scene.height) * 2
        pixels = [number * side / 1000 for number, side in zip(numbers, sides, strict=False)]
        assert len(numbers) == len(expected)
        assert np.abs(np.subtract(pixels, expected)).max() <= 1


def _painted_box(scene, item):
    """Extent of the pixels that change when `item` is taken away."""
    without = replace(scene, items=tuple(other for other in scene.items if other != item))
    changed = np.asarray(draw(scene)).astype(int) != np.asarray(draw(without))
    ys, xs = np.nonzero(changed.any(axis=2))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@pytest.mark.parametrize("choice", range(1, picture_tasks.MAX_COUNT + 1))
def test_counted_dots_do_not_touch(choice):
    for seed in range(20):
        scene = picture_tasks.count(Random(seed), choice).parts[0]
        boxes = [item.box for item in scene.items]
        assert len(boxes) == choice
        for i, a in enumerate(boxes):
            assert 0 <= a[0] < a[2] <= scene.width and 0 <= a[1] < a[3] <= scene.height
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


@pytest.mark.parametrize("choice", clip_tasks.DIRECTIONS)
def test_motion_goes_the_way_of_the_answer_and_stays_in_view(choice):
    for seed in range(20):
        clip = clip_tasks.motion(Random(seed), choice).parts[0]
        boxes = np.array([scene.items[0].box for scene in scenes(clip)])
        travelled = boxes[-1][:2] - boxes[0][:2]
        axis = int(choice in ("up", "down"))
        assert travelled[1 - axis] == 0
        assert travelled[axis] * sum(clip_tasks.DIRECTIONS[choice]) > 15
        assert boxes.min() >= 0 and boxes[:, 2].max() <= clip.width and boxes[:, 3].max() <= clip.height


@pytest.mark.parametrize("choice", clip_tasks.ORDER_CHOICES)
def test_both_events_are_among_the_sampled_frames(choice):
    """At two frames a second, each colour is seen twice or more, one after the other."""
    first, second = choice
    for seed in range(10):
        example = clip_tasks.order(Random(seed), choice)
        seen = _sampled_colours(example.parts[0])
        num_first = seen.count(first)
        assert seen == [first] * num_first + [second] * (len(seen) - num_first)
        assert 2 <= num_first <= len(seen) - 2
        assert example.answer == first


@pytest.mark.parametrize("choice", clip_tasks.TIME_CHOICES)
def test_times_are_those_of_the_frames(choice):
    for seed in range(5):
        example = clip_tasks.time(Random(seed), choice)
        start_s, end_s = (float(text) for text in re.findall(r"\d\.\d", example.answer))
        clip, question = example.parts
        for number, scene in enumerate(scenes(clip)):
            assert (scene.items[0].colour in question) == (start_s <= number / clip.frames_per_s < end_s)


def _sampled_colours(clip):
    frames = list(scenes(clip))
    number = int(clip.num_frames / clip.frames_per_s * 2)
    return [frames[round(i)].items[0].colour for i in np.linspace(0, clip.num_frames - 1, number)]
