"""Several sets as one: numbered one after another, mixed by repeats or by token shares, and refused with every problem named."""


import numpy as np
import pytest

from megatron_keye.data.dataset import Dataset
from megatron_keye.data.mixture import open_samples, read_mixture
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import DataError, PlanError
from megatron_keye.plan.blend import CYCLE
from megatron_keye.plan.mixture import Stage
from tests.tiny import tiny_record, write_part

VARIANT = "keye_vl_1_5"


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(tiny.folder / "tokenizer", VARIANT)


@pytest.fixture
def written(tiny, tmp_path, tokenizer):
    """Writes a mixture file beside links to the tiny sets and opens it."""
    for name in ("train", "valid"):
        (tmp_path / name).symlink_to(tiny.folder / name)

    def write(text):
        (tmp_path / "mixture.yaml").write_text(text)
        return open_samples(str(tmp_path / "mixture.yaml"), tokenizer, VARIANT, tiny.config().data)

    return write


BOTH = "sources:\n- {name: large, path: train}\n- {name: small, path: valid, repeats: 2}\n"


def test_samples_are_those_of_the_sets_one_after_another(tiny, written, tokenizer):
    mixed = written(BOTH)
    data = tiny.config().data
    first, second = (Dataset.open(tiny.folder / name, tokenizer, VARIANT, data) for name in ("train", "valid"))
    assert len(mixed) == len(first) + len(second) == 30
    for sample in range(30):
        part, number = (first, sample) if sample < 24 else (second, sample - 24)
        assert mixed.sample_id(sample) == part.sample_id(number)
        assert mixed.shape(sample) == mixed.shapes[sample] == part.shape(number)
        assert mixed.task(sample) == part.task(number)
        assert mixed.record(sample) == part.record(number)
        assert mixed.record_crc32(sample) == part.record_crc32(number)
        assert mixed.tokens(sample).token_ids.tolist() == part.tokens(number).token_ids.tolist()
        for ours, theirs in zip(mixed.pixels(sample), part.pixels(number), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert {mixed.source(0), mixed.source(29)} == {"large", "small"}
    table = mixed.plan_data.table
    assert table.tokens.tolist() == [shape.num_tokens for shape in mixed.shapes]
    assert table.visual_tokens().tolist() == [shape.num_visual_tokens for shape in mixed.shapes]


def test_weights_by_repeats(tiny, written):
    mixture = written(BOTH).mixture(tiny.config().data, 0)
    assert mixture.stages[0].weights == (round(CYCLE * 24 / 36), CYCLE - round(CYCLE * 24 / 36))


def test_a_folder_is_a_mixture_of_one(tiny, tokenizer):
    config = tiny.config()
    mixture = open_samples(config.data.train, tokenizer, VARIANT, config.data).mixture(config.data, seed=3)
    assert mixture.stages == (Stage(0, (CYCLE,), (0,)),)
    assert sorted(mixture.order()(np.arange(24)).tolist()) == list(range(24))
    assert [source.name for source in mixture.sources] == ["all"]


def test_token_shares_are_reached_over_a_thousand_steps(tiny, tmp_path, tokenizer):
    """Within a point, counted sample by sample, from sets of one kind of sample each."""
    for name in ("media", "tokenizer"):
        (tmp_path / name).symlink_to(tiny.folder / name)
    kinds = {"pictures": (0, 3), "clips": (1,), "texts": (2, 5)}
    for name, kind in kinds.items():
        write_part(tmp_path, name, [tiny_record(number) for number in range(24) if number % 6 in kind])
    sources = "".join(f"- {{name: {name}, path: {name}}}\n" for name in kinds)
    (tmp_path / "mixture.yml").write_text(f"token_shares: {{video: 0.05, image: 0.10, text: 0.85}}\nsources:\n{sources}")
    config = tiny.config()
    mixed = open_samples(str(tmp_path / "mixture.yml"), tokenizer, VARIANT, config.data)
    taken = mixed.mixture(config.data, 0).order()(np.arange(1000 * 4))
    table = mixed.plan_data.table
    visual, tokens = table.visual_tokens()[taken], table.tokens[taken]
    is_clip = np.array([mixed.source(sample) == "clips" for sample in taken.tolist()])
    shares = [visual[is_clip].sum(), visual[~is_clip].sum(), (tokens - visual).sum()] / tokens.sum()
    np.testing.assert_allclose(shares, [0.05, 0.10, 0.85], atol=0.01)


def test_shares_that_no_weights_give_are_refused(written):
    with pytest.raises(PlanError, match="No weights of .* give token shares"):
        written(BOTH + "token_shares: {video: 0.98, image: 0.01, text: 0.01}\n")


def test_tokens_by_modality_are_those_of_the_samples(tiny, tokenizer):
    dataset = tiny.dataset(tiny.config())
    video = image = text = 0
    for sample in range(len(dataset)):
        visual = dataset.shape(sample).num_visual_tokens
        text += dataset.shape(sample).num_tokens - visual
        if any(medium.kind == "video" for medium in dataset.record(sample).media):
            video += visual
        else:
            image += visual
    assert dataset.tokens_by_modality() == (video, image, text)
    assert min(video, image, text) > 0


def test_blocks_follow_the_size_of_samples(tiny, tokenizer):
    config = tiny.config()
    mixed = open_samples(config.data.train, tokenizer, VARIANT, config.data)
    order = config.data.order.model_copy(update={"block_bytes": 30_000})
    (source,) = mixed.mixture(config.data.model_copy(update={"order": order}), 0).sources
    shards = sum(path.stat().st_size for path in (tiny.folder / "train").glob("*.tar"))
    assert source.block_samples == max(1, 30_000 // (shards // 24))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it: Input should be a valid dictionary"),
        ("sources: []", "sources: Tuple should have at least 1 item"),
        ("sources:\n- {name: a, path: train, repeat: 2}", "sources.0.repeat: Extra inputs are not permitted"),
        ("sources:\n- {name: a, path: train, repeats: -1}", "sources.0.repeats: Input should be greater than or equal to 0"),
        ("sources:\n- {name: a, path: train}\n- {name: a, path: valid}", "several sources called a"),
        ("sources:\n- {name: a, path: train}\ntoken_shares: {video: 1}", "token_shares.image: Field required; token_shares.text: Field"),
        ("sources:\n- {name: a, path: nowhere}", "no data set at .*nowhere: no such folder"),
        ("sources: [", "cannot be read"),
    ],
)
def test_a_file_that_is_no_mixture_is_refused_with_every_problem(written, text, problem):
    with pytest.raises(DataError, match=problem):
        written(text)


def test_zero_weights_are_refused(written):
    with pytest.raises(PlanError, match="cannot be used"):
        written("sources:\n- {name: a, path: train, repeats: 0}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the mixture .*gone.yaml cannot be read"):
        read_mixture(tmp_path / "gone.yaml")
