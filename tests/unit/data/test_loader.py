"""Loading a replica's part of a step: rows, patches by rank and round, and what happens to samples that cannot be read."""

import threading

import numpy as np
import pytest

from megatron_keye.contract.media import PATCH_VALUES, PatchGrid, SampleShape, Segment
from megatron_keye.data.loader import ReplicaLoader, patch_counts, read_together, replica_pixel_bytes
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.tokenize import TokenizedSample
from megatron_keye.errors import DataError
from megatron_keye.plan.types import Document, EncodeTask, ReplicaPlan, Row

PAD = 9
SMALL, LARGE = PatchGrid(1, 2, 2), PatchGrid(1, 2, 4)
SHAPES = {
    3: SampleShape(5, (Segment(SMALL, 1), Segment(LARGE, 1))),
    4: SampleShape(3),
    8: SampleShape(4, (Segment(LARGE, 2),)),
}
PLAN = ReplicaPlan(
    rows=(
        Row((Document(3, SHAPES[3], 0, 8), Document(4, SHAPES[4], 8, 4)), 12),
        Row((Document(8, SHAPES[8], 0, 4),), 4),
        Row((), 4),
    ),
    tasks=(EncodeTask(0, 0, 1, 0, 0), EncodeTask(1, 0, 0, 0, 1), EncodeTask(0, 0, 0, 2, 0)),
    num_rounds=2,
)
"""Rank 0 encodes the large picture of sample 3, then that of 8; rank 2 the small one of 3; rank 1 nothing."""


class Samples:
    """Sample s has the token ids 10 s, 10 s + 1, ..., all but the first supervised, and patches full of s + its segment's number."""

    def __init__(self, bad=()):
        self.bad = bad
        self.threads = set()
        self.num_read = 0

    def tokens(self, sample):
        self.threads.add(threading.get_ident())
        self.num_read += 1
        shape = SHAPES[sample]
        ids = np.arange(shape.num_tokens, dtype=np.int32) + 10 * sample
        return TokenizedSample(ids, ids > 10 * sample, shape)

    def pixels(self, sample):
        if sample in self.bad:
            raise DataError(f"sample {sample} is cut off")
        return [np.full((s.grid.num_patches, PATCH_VALUES), sample + n, np.uint8) for n, s in enumerate(SHAPES[sample].segments)]

    def sample_id(self, sample):
        return f"id{sample}"


def load(samples, skip_bad=False):
    loader = ReplicaLoader(ThreadSource(samples, threads=2), pad_id=PAD, skip_bad=skip_bad)
    try:
        return loader.load(PLAN)
    finally:
        loader.close()


def test_rows_hold_documents_where_the_plan_says_and_padding_elsewhere():
    data = load(Samples())
    assert [row.token_ids.tolist() for row in data.rows] == [[30, 31, 32, 33, 34, 9, 9, 9, 40, 41, 42, 9], [80, 81, 82, 83], [9, 9, 9, 9]]
    assert [np.flatnonzero(row.supervised).tolist() for row in data.rows] == [[1, 2, 3, 4, 9, 10], [1, 2, 3], []]
    assert data.skipped == []


def test_patches_are_grouped_by_rank_and_round():
    data = load(Samples())
    found = {place: [(len(p), int(p[0, 0])) for p in patches] for place, patches in data.patches.items()}
    assert found == {(0, 0): [(8, 4)], (0, 1): [(8, 8)], (2, 0): [(4, 3)]}
    counts = patch_counts(PLAN, num_ranks=3)
    assert counts == [[8, 8], [0, 0], [4, 0]]


def test_bytes_are_counted_before_anything_is_decoded():
    assert replica_pixel_bytes(PLAN) == 20 * PATCH_VALUES


def test_a_skipped_sample_leaves_its_slot_empty_and_its_reason():
    data = load(Samples(bad=(3,)), skip_bad=True)
    assert data.rows[0].token_ids.tolist() == [9] * 8 + [40, 41, 42, 9]
    assert np.flatnonzero(data.rows[0].supervised).tolist() == [9, 10]
    assert [(s.sample, s.sample_id, s.reason) for s in data.skipped] == [(3, "id3", "sample 3 is cut off")]
    assert [patches.any() for patches in data.patches[(0, 0)]] == [False]
    # Every other sample is as it would be.
    assert data.patches[(0, 1)][0][0, 0] == 8
    assert sum(len(segment) for patches in data.patches.values() for segment in patches) == 20


def test_without_the_policy_a_bad_sample_is_raised():
    with pytest.raises(DataError, match="sample 8 is cut off"):
        load(Samples(bad=(8,)))


def test_other_errors_are_never_skipped():
    samples = Samples()
    samples.pixels = lambda sample: 1 / 0
    with pytest.raises(ZeroDivisionError):
        load(samples, skip_bad=True)


def test_a_sample_that_occurs_twice_is_in_both_places():
    twice = ReplicaPlan((Row((Document(4, SHAPES[4], 0, 4), Document(4, SHAPES[4], 4, 4)), 8),), (), 0)
    loader = ReplicaLoader(ThreadSource(Samples(), threads=2), pad_id=PAD, skip_bad=False)
    assert loader.load(twice).rows[0].token_ids.tolist() == [40, 41, 42, 9, 40, 41, 42, 9]
    loader.close()


def test_bytes_are_counted_per_step():
    samples = Samples()
    loader = ReplicaLoader(ThreadSource(samples, 2, bytes_read=lambda: 100 * samples.num_read), pad_id=PAD, skip_bad=False)
    assert [loader.load(PLAN).bytes_read for _ in range(3)] == [300, 300, 300]
    assert (loader.counts.samples, loader.counts.bytes_read) == (9, 900)
    loader.close()


def test_decoding_runs_beside_the_caller():
    samples = Samples()
    load(samples)
    assert threading.get_ident() not in samples.threads


GROUPS = [(0, 2, []), (1, 4, [1]), (5, 2, [3, 2]), (40, 2, [16, 16, 8]), (4, 8, [1, 1, 1, 1])]


@pytest.mark.parametrize(("num_texts", "threads", "sizes"), GROUPS)
def test_texts_are_read_in_groups_and_media_alone_and_first(num_texts, threads, sizes):
    shapes = {n: SampleShape(5) for n in range(num_texts)} | dict.fromkeys((100, 101), SHAPES[3])
    groups = read_together(shapes, threads)
    assert groups[:2] == [[100], [101]]
    assert [len(group) for group in groups[2:]] == sizes
    assert sorted(sample for group in groups for sample in group) == sorted(shapes)
