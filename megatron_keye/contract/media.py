"""Patch grids and attention segments: the one vocabulary in which data, plan and model speak about pixels."""

from dataclasses import dataclass

PATCH_PIXELS = 14
"""Side of a patch."""
MERGE = 2
"""Patches per side that the projector merges into one visual token."""
TOKEN_PIXELS = PATCH_PIXELS * MERGE
"""Side of the square of pixels behind one visual token."""
PATCH_VALUES = 3 * PATCH_PIXELS * PATCH_PIXELS
"""uint8 values of one patch, in (channel, row, column) order."""


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """A t x h x w block of patches that the ViT attends over as one segment, frames in time order, rows first.

    An image and a 1.5 frame have t = 1; a Preview clip is one grid with t = its frames. h and w are even.
    """

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w

    @property
    def num_tokens(self) -> int:
        """Visual tokens, which are decoder positions, after the 2x2 merge."""
        return self.num_patches // (MERGE * MERGE)


@dataclass(frozen=True, slots=True)
class Segment:
    """One attention segment inside a document.

    `gap_tokens` counts the text tokens between the end of the previous segment's visual tokens (or the start of the
    document) and the first visual token of this one, so a document's structure is its segments and its length.
    `ticks_per_frame` is how far the temporal M-RoPE position moves per frame (Preview clips: seconds per frame times
    tokens per second); it has no effect where t = 1.
    """

    grid: PatchGrid
    gap_tokens: int
    ticks_per_frame: float = 1.0


@dataclass(frozen=True, slots=True)
class SampleShape:
    """What planning knows about a sample: its length in tokens (unpadded, visual tokens included) and its segments."""

    num_tokens: int
    segments: tuple[Segment, ...] = ()

    @property
    def num_patches(self) -> int:
        return sum(s.grid.num_patches for s in self.segments)

    @property
    def num_visual_tokens(self) -> int:
        return sum(s.grid.num_tokens for s in self.segments)

    def visual_starts(self) -> list[int]:
        """Offset in the document of each segment's first visual token."""
        starts, at = [], 0
        for segment in self.segments:
            at += segment.gap_tokens
            starts.append(at)
            at += segment.grid.num_tokens
        return starts
