"""Which packets of a clip a decoder needs for some of its frames. Left out are those of a group of pictures after the last wanted one,
frames that are not wanted and to which no other refers, temporal layers above those of wanted frames, and whole groups in which no frame
is wanted. The frames that are decoded are the same."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

from megatron_keye.data.media.bitstream import PictureFacts


class PacketHeader(NamedTuple):
    """What a file says of a packet, in the order of decoding."""

    pts: int | None
    duration: int
    is_keyframe: bool
    is_discard: bool
    facts: PictureFacts


def needed_runs(packets: Sequence[PacketHeader], wanted_pts: Collection[int]) -> list[list[int]]:
    """Places of the packets, all of which have a `pts`, that the frames at `wanted_pts` need: in the order of decoding, as runs between
    which a decoder must be emptied."""
    starts = [0] + [place for place, packet in enumerate(packets) if packet.facts.is_clean_start and place]
    runs: list[list[int]] = []  # from the last one to the first, each from its last packet to its first
    before_is_needed = False  # by the group that was looked at before, which is the next one in the file
    for start, stop in reversed(list(pairwise([*starts, len(packets)]))):
        if not before_is_needed:
            runs.append([])
            stop = max((n + 1 for n in range(start, stop) if packets[n].pts in wanted_pts), default=start)
            top_layer = -1  # of the wanted frames that follow
        # Shown before the group's first frame: these refer to the group before as well, and nothing else of this group refers to them.
        is_clean = packets[start].facts.is_clean_start
        leading = {n for n in range(start + 1, stop) if is_clean and packets[n].pts < packets[start].pts}
        before_is_needed = stop - 1 in leading or any(packets[n].pts in wanted_pts for n in leading)
        for n in reversed(range(start, stop)):
            facts = packets[n].facts
            if packets[n].pts in wanted_pts:
                top_layer = max(top_layer, facts.layer)
                runs[-1].append(n)
            elif (before_is_needed or n not in leading) and (facts.layer < top_layer or (facts.layer == top_layer and facts.is_reference)):
                runs[-1].append(n)
    return [run[::-1] for run in reversed(runs) if run]
