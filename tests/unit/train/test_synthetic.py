"""The proof's batch really has what makes a layout's mistakes visible, in every layout that `keye verify-layout` runs."""

import numpy as np
import pytest

from megatron_keye.config.load import load_config
from megatron_keye.plan.context_split import local_tokens
from megatron_keye.train.commands.verify_layout import DEFAULT_LAYOUTS
from megatron_keye.train.layouts import parse_layout
from megatron_keye.train.placement import rank_grid
from megatron_keye.train.synthetic import proof_shapes, synthetic_plan
from megatron_keye.train.verify import proof_config

RECIPES = ("debug", "debug_preview")


class Proof:
    """The plans of all proof steps under one layout."""

    def __init__(self, recipe, name):
        self.layout = parse_layout(name)
        self.config = self.layout.apply(proof_config(load_config(recipe), "fp64"))
        self.grid = rank_grid(self.config, self.layout.num_replicas)
        self.plans = [synthetic_plan(shapes, self.config, self.layout.num_replicas) for shapes in proof_shapes(self.config.model.variant)]
        self.replicas = [replica for plan in self.plans for replica in plan]
        self.rows = [row for replica in self.replicas for row in replica.rows]
        self.documents = [document for row in self.rows for document in row.documents]


@pytest.fixture(params=[(recipe, name) for recipe in RECIPES for name in DEFAULT_LAYOUTS], ids="-".join)
def proof(request):
    return Proof(*request.param)


def items_of(document):
    """Token ranges of a document's visual segments within it."""
    return [
        (start, start + segment.grid.num_tokens)
        for start, segment in zip(document.shape.visual_starts(), document.shape.segments, strict=True)
    ]


def test_rows_hold_three_documents_or_more_of_odd_lengths(proof):
    assert all(document.shape.num_tokens % 2 for document in proof.documents)
    for replica_number in range(proof.grid.dp):
        rows = [row for plan in proof.plans for row in plan[replica_number].rows]
        assert max(len(row.documents) for row in rows) >= 3
    assert np.mean([len(row.documents) for row in proof.rows]) >= 3


def test_an_item_crosses_each_context_parallel_boundary(proof):
    num_chunks = 2 * proof.grid.cp
    crossed = set()
    for document in proof.documents:
        chunk = document.padded_tokens // num_chunks
        for start, end in items_of(document):
            crossed |= {cut for cut in range(1, num_chunks) if start < cut * chunk < end}
    assert crossed == set(range(1, num_chunks))


def test_an_item_crosses_each_sequence_parallel_boundary(proof):
    crossed = set()
    for row in proof.rows:
        items = np.zeros(row.num_tokens, dtype=np.int64)
        numbered = 0
        for document in row.documents:
            for start, end in items_of(document):
                numbered += 1
                items[document.start + start : document.start + end] = numbered
        for cp_rank in range(proof.grid.cp):
            held = items[local_tokens(row.cu_seqlens, proof.grid.cp, cp_rank)]
            for cut in range(1, proof.grid.tp):
                at = cut * len(held) // proof.grid.tp
                if held[at] and held[at] == held[at - 1]:
                    crossed.add((cp_rank, cut))
    assert crossed == {(cp_rank, cut) for cp_rank in range(proof.grid.cp) for cut in range(1, proof.grid.tp)}


def test_a_rank_has_no_item_and_a_microbatch_no_image(proof):
    if proof.layout.world_size > 1:
        busy = {(number, task.encoder) for number, replica in enumerate(proof.replicas) for task in replica.tasks}
        assert len(busy) < len(proof.replicas) * proof.grid.replica_size
    assert any(not any(document.shape.segments for document in row.documents) for row in proof.rows)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_process_needs_several_rounds_and_has_a_long_video(recipe):
    proof = Proof(recipe, "one")
    assert max(replica.num_rounds for replica in proof.replicas) > 1
    frames = [sum(segment.grid.t for segment in document.shape.segments) for document in proof.documents]
    assert max(frames) > 10
    assert all(replica.rows for replica in proof.replicas)
