"""Rules between settings, and the values that follow from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.config.derive import (
    check,
    check_settings,
    num_replicas,
    padded_vocab_size,
    replica_size,
    require_valid,
    stage_layers,
)
from megatron_keye.config.load import load_config
from megatron_keye.errors import SettingsError
from megatron_keye.recipes import recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid_for_one_and_for_many_replicas(name):
    config = load_config(name)
    for replicas in (1, 3):
        assert check(config, replicas * replica_size(config)) == []
        assert num_replicas(config, replicas * replica_size(config)) == replicas


@pytest.mark.parametrize("layout", ["tp=4", "cp=4", "pp=4", "tp=2 cp=2 pp=2 vp=2", "tp=4 cp=4 pp=4"])
def test_the_debug_model_runs_in_every_layout_of_four(layout):
    config = load_config("debug", [f"parallel.{part}" for part in layout.split()])
    assert check(config, replica_size(config)) == []


PROBLEMS = [
    (["parallel.tp=2"], 3, "start a multiple of 2 processes"),
    (["parallel.tp=2", "parallel.cp=2", "parallel.pp=2"], 4, "= 2 * 2 * 2 = 8 ranks"),
    (["parallel.tp=8"], 8, "model.decoder.num_kv_groups = 4 is not a multiple of parallel.tp = 8"),
    (["model.decoder.ffn_hidden_size=385", "parallel.tp=2"], 2, "model.decoder.ffn_hidden_size = 385"),
    (["model.decoder.num_kv_groups=3"], 1, "not a multiple of model.decoder.num_kv_groups = 3"),
    (["data.storage.cache_bytes=1000"], 1, "is not above data.storage.chunk_bytes = 1048576, so that no chunk would be kept"),
    (["model.decoder.mrope_section=[2, 2, 3]"], 1, "sums to 7: expected half of model.decoder.head_dim = 16, which is 8"),
    (["parallel.sequence_parallel=true"], 1, "raise tp or turn it off"),
    (["parallel.vp=2"], 1, "virtual stages need at least two pipeline ranks"),
    (["parallel.pp=3"], 3, "num_layers = 4 is not a multiple of parallel.pp * vp = 3"),
    (["parallel.pp=2", "parallel.layers_per_stage=[4]"], 2, "has 1 entries: expected parallel.pp * vp = 2"),
    (["parallel.pp=2", "parallel.layers_per_stage=[1, 2]"], 2, "sums to 3: expected model.decoder.num_layers = 4"),
    (["data.pad_multiple_tokens=6", "data.seq_length_tokens=600", "parallel.cp=2"], 2, "not a multiple of 2 * cp * tp = 4"),
    (["data.seq_length_tokens=1000"], 1, "use 992, for example"),
    (["data.seq_length_tokens=16"], 1, "use 32, for example"),
    (["model.vision.patch_size=16"], 1, "only 14 is supported"),
    (["model.vision.num_heads=5"], 1, "not a multiple of num_heads = 5"),
    (["model.vision.num_heads=16"], 1, "num_heads = 6: expected a multiple of 4"),
    (["data.image.min_tokens=300"], 1, "data.image.min_tokens = 300 is above"),
    (["data.video.min_frame_tokens=65"], 1, "data.video.min_frame_tokens = 65 is above data.video.max_frame_tokens = 64"),
    (["data.video.total_tokens=3"], 1, "no frame would fit"),
    (["optimizer.decay_steps=10"], 1, "optimizer.warmup_steps = 100 is above optimizer.decay_steps = 10"),
    (["model.freeze=[vision, projector, embedding, decoder]"], 1, "nothing would train"),
    (["data.valid=null"], 1, "name a held-out set"),
    (["train.overlap_param_gather=true"], 1, "needs both together"),
    (["train.export_hf_every_steps=300"], 1, "is not a multiple of train.save_every_steps = 250"),
    (["train.keep_every_steps=300"], 1, "no checkpoint of such steps would be there to keep"),
    (["optimizer.lr=0"], 1, "optimizer.lr is 0.0: expected a number > 0"),
    (["optimizer.lr=.nan"], 1, "optimizer.lr is nan: expected a finite number"),
    (["optimizer.clip_norm=.inf"], 1, "optimizer.clip_norm is inf: expected a finite number"),
    (["optimizer.lr_scale.vision=-1"], 1, "optimizer.lr_scale.vision is -1.0: expected a number >= 0"),
    (["optimizer.beta2=1"], 1, "optimizer.beta2 is 1.0: expected a number >= 0 and < 1"),
]


@pytest.mark.parametrize(("overrides", "world_size", "message"), PROBLEMS)
def test_each_contradiction_is_found_and_alone(overrides, world_size, message):
    (problem,) = check(load_config("debug", overrides), world_size)
    assert message in problem


def test_all_contradictions_are_raised_together():
    config = load_config("debug", ["parallel.pp=3", "optimizer.lr=-1"])
    with pytest.raises(SettingsError) as caught:
        require_valid(config, 4)
    assert len(caught.value.problems) == 3
    assert len(check_settings(config)) == 2
    require_valid(load_config("debug"), 2)


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(1024, 1, 1024), (1024, 4, 1024), (1001, 1, 1001), (1001, 2, 1002), (1001, 4, 1004)])
def test_the_vocabulary_is_padded_to_tp_only(vocab, tp, padded):
    config = load_config("debug", [f"model.decoder.vocab_size={vocab}", f"parallel.tp={tp}"])
    assert padded_vocab_size(config) == padded


def test_given_stage_layouts_are_kept():
    config = load_config("debug", ["parallel.pp=2", "parallel.vp=2", "parallel.layers_per_stage=[0, 2, 1, 1]"])
    assert check(config, 2) == []
    assert stage_layers(config) == (0, 2, 1, 1)


@given(pp=st.integers(1, 8), vp=st.integers(1, 4), layers=st.integers(1, 64))
def test_valid_stages_hold_every_layer_once(pp, vp, layers):
    config = load_config("debug", [f"parallel.pp={pp}", f"parallel.vp={vp}", f"model.decoder.num_layers={layers}"])
    if check_settings(config) == []:
        assert len(stage_layers(config)) == pp * vp
        assert sum(stage_layers(config)) == layers
    else:
        assert layers % (pp * vp) or (vp > 1 and pp == 1)
