"""When a run may go on, or run at all, with what decodes now."""

import pytest

from megatron_keye.errors import SettingsError
from megatron_keye.train.decoders import decoder_notes, one_decoder


@pytest.mark.parametrize("is_mixing_allowed", [False, True])
def test_one_decoder_needs_no_permit(is_mixing_allowed):
    assert one_decoder(["a-1", "a-1"], is_mixing_allowed) == "a-1"
    assert decoder_notes("a-1", "a-1", is_mixing_allowed) == []
    assert decoder_notes(None, "a-1", is_mixing_allowed) == [], "a checkpoint without an id"


def test_replicas_that_decode_otherwise_are_refused_unless_allowed():
    with pytest.raises(SettingsError, match="3 replicas decode with 2 decoders: a-1; b-2: .*data.media.allow_mixed_decoders=true"):
        one_decoder(["b-2", "a-1", "b-2"], False)
    assert one_decoder(["b-2", "a-1", "b-2"], True) == one_decoder(["a-1", "b-2"], True) == "a-1; b-2", "whichever ranks they are on"


def test_a_run_that_would_go_on_with_another_decoder_is_refused_unless_allowed():
    with pytest.raises(SettingsError, match="decoded with a-1 up to .* go on with b-2.*data.media.allow_mixed_decoders=true"):
        decoder_notes("a-1", "b-2", False)
    (note,) = decoder_notes("a-1", "b-2", True)
    assert note.startswith("WARNING: decoded with b-2 from here on, with a-1 before")
