"""The benchmark's ways are complete, its bounds hold, and its targets are met in small cells."""

import json

import numpy as np
import pytest

from benchmarks import balance
from benchmarks.balance_methods import METHODS, Case, karmarkar_karp, over_bound
from benchmarks.mixes import MIXES, draw


def case_of(mix, num_replicas, samples_each, seed=0):
    return Case(draw(mix, num_replicas * samples_each, seed), num_replicas, mix.max_tokens)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_places_every_sample_and_none_beats_a_bound(mix, name):
    case = case_of(mix, 8, 16)
    placed = METHODS[name](case)
    assert placed.replica.shape == case.total_ns.shape
    assert 0 <= placed.replica.min() and placed.replica.max() < 8
    ratios = over_bound(case, placed)
    assert min(ratios.values()) >= 1 - 1e-9
    assert ratios["microbatch, rows"] <= ratios["microbatch"]


def test_mixes_are_within_limits_and_long_tailed():
    for mix in MIXES:
        samples = draw(mix, 4000, 1)
        assert 0 < samples.tokens.min() and samples.tokens.max() <= mix.max_tokens
        assert samples.first[-1] == len(samples.segment_ns)
        owner = np.repeat(np.arange(4000), np.diff(samples.first))
        assert np.bincount(owner, samples.segment_ns, 4000).tolist() == samples.vision_ns.tolist()
        assert samples.decoder_ns.max() > 5 * samples.decoder_ns.mean()


def test_karmarkar_karp_gives_equally_many_to_each_and_differences_sums():
    case = case_of(MIXES[0], 8, 16)
    replica = karmarkar_karp(case).replica
    assert np.bincount(replica).tolist() == [16] * 8
    sums = np.bincount(replica, case.total_ns)
    assert sums.max() < 1.1 * sums.min()


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_targets_are_met_in_a_small_cell(mix):
    cell = balance.measure_cell(mix, 16, 16, 5)["methods"]

    def mean(name, barrier):
        return np.mean(cell[name]["over_bound"][barrier])

    assert mean("ours, step", "step") < 1.005
    assert max(cell["ours, step"]["over_bound"]["step"]) < 1.02
    assert mean("ours, phase", "phase") < 1.09
    assert mean("ours, phase + spill", "phase") < 1.015
    assert mean("ours, microbatch", "microbatch, rows") < 1.06


def test_json_holds_every_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(balance, "QUICK_REPLICAS", (4,))
    monkeypatch.setattr(balance, "QUICK_SAMPLES_EACH", (4,))
    balance.main(["--quick", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    results = json.loads((tmp_path / "out.json").read_text())
    assert [cell["mix"] for cell in results["cells"]] == [mix.name for mix in MIXES]
    assert set(results["cells"][0]["methods"]) == set(METHODS)
    assert (tmp_path / "out.png").stat().st_size > 10_000
