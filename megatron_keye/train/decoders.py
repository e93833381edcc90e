"""A run is decoded by one decoder from its first step to its last, unless its settings allow others."""

from collections.abc import Sequence

from megatron_keye.errors import SettingsError

DECODER = "decoder"
"""Name of the decoder's id among the versions in a checkpoint."""
_PERMIT = "data.media.allow_mixed_decoders=true"


def one_decoder(ids: Sequence[str], is_mixing_allowed: bool) -> str:
    """The decoder id of all leaders, or the different ones joined. Raises SettingsError where they differ and may not."""
    found = sorted(set(ids))
    if len(found) > 1 and not is_mixing_allowed:
        raise SettingsError(
            f"the leaders of {len(ids)} replicas decode with {len(found)} decoders: {'; '.join(found)}: install the same versions "
            f"on all nodes, or set {_PERMIT} to train on pixels that differ between replicas"
        )
    return "; ".join(found)


def decoder_notes(before: str | None, now: str, is_mixing_allowed: bool) -> list[str]:
    """What to tell people about a run that goes on, with the id in its checkpoint and its id now. None is that of checkpoints without one.

    Raises SettingsError where the decoder changed and may not.
    """
    if before is None or before == now:
        return []
    if not is_mixing_allowed:
        raise SettingsError(
            f"the run was decoded with {before} up to its checkpoint, and would go on with {now}, which makes other pixels: "
            f"use the versions and the data.media.decoder that it began with, or set {_PERMIT}"
        )
    return [f"WARNING: decoded with {now} from here on, with {before} before the checkpoint ({_PERMIT})"]
