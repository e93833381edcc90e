"""Media of indexed samples: where the bytes are, and everything that their pixels depend on."""

from dataclasses import dataclass

import numpy as np

from megatron_keye.config.schema import Variant
from megatron_keye.data.items import Item, Resolved, load_patches
from megatron_keye.data.media.decoder import MediaDecoder
from megatron_keye.data.places import Place
from megatron_keye.data.record import Media
from megatron_keye.errors import DataError, UnsupportedError


@dataclass(frozen=True, slots=True)
class StoredMedium:
    """An image or video of a sample. `where` says in messages which one it is."""

    place: Place
    media: Media
    item: Item
    resolved: Resolved
    variant: Variant
    where: str

    def patches(self, decoder: MediaDecoder) -> list[np.ndarray]:
        """uint8 [num_patches, 588] per attention segment, in order. Raises DataError for media that cannot be decoded, and
        UnsupportedError for those that this decoder cannot."""
        blob = self.place.read(self.media, self.where)
        try:
            return load_patches(self.item, self.resolved, blob, self.variant, decoder)
        except (DataError, UnsupportedError) as error:
            raise type(error)(f"{self.where}: {error}") from error
