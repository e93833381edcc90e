"""What a run trains on is refused where it cannot be what the settings say."""

import shutil

import pytest

from megatron_keye.errors import DataError, PlanError, SettingsError
from megatron_keye.train.dry_run import describe
from megatron_keye.train.inputs import open_inputs
from tests.tiny import tiny_record, write_part


@pytest.mark.parametrize(("batch", "batches"), [(5, 5), (13, 2)])
def test_a_lookahead_window_larger_than_the_training_set_is_refused(tiny, batch, batches):
    config = tiny.config(f"data.global_batch_samples={batch}", f"data.lookahead.batches={batches}")
    said = rf"= {batches} \* {batch} = {batch * batches} samples are planned together, and .*/train has 24; .* to {24 // batch} or less"
    with pytest.raises(SettingsError, match=said):
        open_inputs(config)
    assert "samples are planned together" in describe(config, 1)


@pytest.mark.parametrize(("batch", "batches"), [(6, 4), (30, 1)])
def test_a_window_of_the_whole_set_and_no_lookahead_are_fine(tiny, batch, batches):
    config = tiny.config(f"data.global_batch_samples={batch}", f"data.lookahead.batches={batches}")
    assert len(open_inputs(config).train) == 24


@pytest.fixture
def folder(tiny, tmp_path):
    for name in ("media", "tokenizer"):
        (tmp_path / name).symlink_to(tiny.folder / name)
    return tmp_path


LONG = {"id": "long", "document": [{"type": "image", "image": "media/0.png"}] * 200}
"""200 pictures, each of 4 visual tokens at least: no policy makes it fit a row of 128."""


def test_a_sample_that_no_policy_can_fit_is_left_out_with_its_reason(tiny, folder):
    write_part(folder, "train", [tiny_record(2), LONG])
    train = open_inputs(tiny.config(f"data.train={folder / 'train'}", "data.seq_length_tokens=128")).train
    assert len(train) == 1
    ((name, reason),) = train.rejected
    assert name == "long" and "128" in reason, reason


def test_a_source_of_which_no_sample_fits_is_refused(tiny, folder):
    """Alone, and as one of several."""
    write_part(folder, "long", [LONG])
    mixture = folder / "mixture.yaml"
    mixture.write_text(f"sources:\n- {{name: good, path: {tiny.folder / 'train'}}}\n- {{name: bad, path: long}}\n")
    for train in (folder / "long", mixture):
        with pytest.raises(DataError, match=r"the data set at .*/long has no usable sample: all 1 are too long, the first: \('long'"):
            open_inputs(tiny.config(f"data.train={train}", "data.seq_length_tokens=128"))


def test_weights_that_are_all_zero_are_refused(tiny, folder):
    mixture = folder / "mixture.yaml"
    mixture.write_text(f"sources:\n- {{name: only, path: {tiny.folder / 'train'}, repeats: 0}}\n")
    with pytest.raises(PlanError, match=r"Weights \[0.0\] of sources \['only'\] cannot be used: expected none below 0, one above"):
        open_inputs(tiny.config(f"data.train={mixture}"))


def test_the_index_of_other_shards_is_refused(tiny, folder):
    write_part(folder, "train", [tiny_record(2)])
    shutil.rmtree(folder / "train" / "index")
    shutil.copytree(tiny.folder / "train" / "index", folder / "train" / "index")
    with pytest.raises(DataError, match=r"shard-\w+\.tar.*(index_shards\.py|restore)"):
        open_inputs(tiny.config(f"data.train={folder / 'train'}"))
