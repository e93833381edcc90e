"""Flat ranges as rectangles, against `Piece.write`, which places the same elements by tensor views."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.checkpoint.ranges import Fragment, Rectangle, cut, fragments_of, matrix_shape
from megatron_keye.config.schema import DecoderConfig
from megatron_keye.model.names import decoder_pieces, encoder_pieces

DECODER = DecoderConfig(
    num_layers=2, hidden_size=6, num_heads=8, num_kv_groups=4, head_dim=3, ffn_hidden_size=8, vocab_size=13, mrope_section=(1, 1, 1)
)
LAYER = "decoder.layers.1."


def local_shape(name: str, tp: int) -> tuple[int, ...]:
    """Of Megatron's parameters at DECODER's sizes; the vocabulary of 13 is padded to a multiple of tp."""
    return {
        "embedding.word_embeddings.weight": (-(-13 // tp), 6),
        "output_layer.weight": (-(-13 // tp), 6),
        "decoder.final_layernorm.weight": (6,),
        f"{LAYER}self_attention.linear_qkv.weight": (48 // tp, 6),
        f"{LAYER}self_attention.linear_proj.weight": (6, 24 // tp),
        f"{LAYER}self_attention.q_layernorm.weight": (3,),
        f"{LAYER}mlp.linear_fc1.weight": (16 // tp, 6),
        f"{LAYER}mlp.linear_fc2.weight": (6, 8 // tp),
    }[name]


NAMES = [
    "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight",
    f"{LAYER}self_attention.linear_qkv.weight", f"{LAYER}self_attention.linear_proj.weight",
    f"{LAYER}self_attention.q_layernorm.weight", f"{LAYER}mlp.linear_fc1.weight", f"{LAYER}mlp.linear_fc2.weight",
]  # fmt: skip


def pieces_of(name, tensor, tp, rank):
    return list(decoder_pieces(SimpleNamespace(first_layer=4), {name: tensor}, DECODER, tp, rank))


def numbered(pieces) -> dict[str, torch.Tensor]:
    """Canonical tensors in which every element of every tensor is another number, from 1 on."""
    shapes = {piece.name: piece.full_shape for piece in pieces}
    whole, first = {}, 1
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        whole[name] = torch.arange(first, first + numel, dtype=torch.float64).view(shape)
        first += numel
    return whole


def rectangle_of(tensor: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
    rows, columns = rectangle.index_within(Rectangle(0, 0, *matrix_shape(tuple(tensor.shape))))
    return tensor.view(matrix_shape(tuple(tensor.shape)))[rows, columns]


def placed(fragments, canonical, numel, start, stop):
    """The range [start, stop) put together from the rectangles; zero where no fragment says anything."""
    flat = torch.zeros(numel, dtype=torch.float64)
    for fragment in fragments:
        parts = list(cut(fragment, start, stop))
        assert len(parts) <= 3
        for part in parts:
            assert start <= part.start < part.stop <= stop
            assert torch.all(flat[part.start : part.stop] == 0), "two fragments claim one element"
            flat[part.start : part.stop] = rectangle_of(canonical[part.name], part.rectangle).flatten()
    return flat


@given(st.sampled_from(NAMES), st.sampled_from([1, 2, 4]), st.data())
def test_a_range_holds_the_rectangles_that_writing_the_pieces_puts_there(name, tp, data):
    rank = data.draw(st.integers(0, tp - 1))
    local = torch.zeros(local_shape(name, tp), dtype=torch.float64)
    canonical = numbered(pieces_of(name, local, tp, rank))
    for piece in pieces_of(name, local, tp, rank):
        piece.write(canonical[piece.name])
    start = data.draw(st.integers(0, local.numel()))
    stop = data.draw(st.integers(start, local.numel()))
    shapes = pieces_of(name, torch.empty(local.shape, device="meta"), tp, rank)
    fragments = [fragment for piece in shapes for fragment in fragments_of(piece)]
    expected = torch.zeros(local.numel(), dtype=torch.float64)
    expected[start:stop] = local.flatten()[start:stop]
    torch.testing.assert_close(placed(fragments, canonical, local.numel(), start, stop), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_all_ranks_together_cover_every_canonical_element(name, tp):
    covered: dict[str, torch.Tensor] = {}
    for rank in range(tp):
        pieces = pieces_of(name, torch.empty(local_shape(name, tp), device="meta"), tp, rank)
        for piece in pieces:
            covered.setdefault(piece.name, torch.zeros(piece.full_shape))
            for fragment in fragments_of(piece):
                rectangle_of(covered[piece.name], fragment.rectangle).add_(1)
    copies = tp if "norm" in name else 1
    assert all(torch.all(count == copies) for count in covered.values())


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2, 2)])
def test_whole_tensors_of_any_dimension_are_one_fragment(shape):
    (piece,) = encoder_pieces({"visual.x": torch.empty(shape, device="meta")})
    assert fragments_of(piece) == [Fragment("visual.x", 0, Rectangle(0, 0, *matrix_shape(shape)))]


def test_a_range_that_starts_and_ends_within_rows_is_cut_in_three():
    fragment = Fragment("w", 100, Rectangle(10, 4, 5, 7))
    assert list(cut(fragment, 102, 126)) == [
        Fragment("w", 102, Rectangle(10, 6, 1, 5)),
        Fragment("w", 107, Rectangle(11, 4, 2, 7)),
        Fragment("w", 121, Rectangle(13, 4, 1, 5)),
    ]
    assert list(cut(fragment, 0, 100)) == []
    assert list(cut(fragment, 0, 1000)) == [fragment]


@given(st.data())
def test_the_common_part_of_two_rectangles_is_that_of_their_cells(data):
    number = st.integers(1, 5)
    place = st.integers(0, 5)
    first, second = (Rectangle(data.draw(place), data.draw(place), data.draw(number), data.draw(number)) for _ in range(2))

    def cells(r):
        return {(row, column) for row in range(r.row, r.row + r.num_rows) for column in range(r.column, r.column + r.num_columns)}

    common = first.common(second)
    assert (cells(common) if common else set()) == cells(first) & cells(second)
    if common:
        rows, columns = common.index_within(first)
        grid = torch.zeros(first.num_rows, first.num_columns)
        grid[rows, columns] = 1
        assert {(r + first.row, c + first.column) for r, c in grid.nonzero().tolist()} == cells(common)
