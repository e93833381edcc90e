"""What is told of drift and of slow ranks, and when."""

import math

import pytest

from megatron_keye.train.pace import FEWEST_STEPS, Pace


def by_rank(encode=(1.0, 1.0, 1.0), decoder=2.0, predicted=(3.0, 2.0), loads=(5.0, 5.0, 5.0)):
    """A step in which each rank's backward pass takes twice its forward pass."""
    num = len(encode)
    return {
        "encode": encode, "encode_backward": [2 * seconds for seconds in encode], "decoder": [decoder] * num,
        "vision_predicted_s": [predicted[0]] * num, "decoder_predicted_s": [predicted[1]] * num, "vision_load": loads,
    }  # fmt: skip


def observe(pace, steps, **step):
    remarks = []
    for _ in range(steps):
        fields = pace.observe(by_rank(**step))
        remarks += pace.remarks()
    return fields, remarks


def test_what_is_as_predicted_is_not_remarked():
    fields, remarks = observe(Pace(), 20)
    assert fields == {"vision_drift": 1.0, "decoder_drift": 1.0, "slowest_rank": 0, "slowest_rank_speed": 1000}
    assert remarks == []


def test_drift_is_remarked_once_until_it_has_gone():
    pace = Pace()
    _, remarks = observe(pace, 30, decoder=3.0)
    assert remarks == ["the decoder takes 1.50 times as long as data.cost_file says: run `keye calibrate` again between two starts"]
    assert observe(pace, 60)[1] == []
    assert len(observe(pace, 60, decoder=1.0)[1]) == 1


def test_nothing_is_remarked_before_there_are_enough_steps():
    pace = Pace()
    assert observe(pace, FEWEST_STEPS - 1, decoder=9.0)[1] == []
    assert len(observe(pace, 1, decoder=9.0)[1]) == 1


def test_without_measured_times_only_speeds_are_told():
    fields, remarks = observe(Pace(), 20, predicted=(0.0, 0.0), encode=(1.0, 1.0, 2.0))
    assert fields == {"slowest_rank": 2, "slowest_rank_speed": 500}
    assert remarks == ["rank 2 encodes at 50% of the usual speed: look at its host"]


@pytest.mark.parametrize("loads", [(math.nan, 5.0, 5.0), (0.0, 5.0, 5.0)])
def test_a_rank_that_encodes_nothing_is_not_slow(loads):
    fields, _ = observe(Pace(), 20, encode=(9.0, 1.0, 1.0), loads=loads)
    assert fields["slowest_rank_speed"] == 1000
