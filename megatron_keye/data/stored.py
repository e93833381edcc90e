"""Media of indexed shards: where the bytes are, and everything that their pixels depend on."""

from dataclasses import dataclass

import numpy as np

from megatron_keye.config.schema import Variant
from megatron_keye.data.items import Item, Resolved, load_patches
from megatron_keye.data.record import Media
from megatron_keye.data.shards import Span, check_sha256
from megatron_keye.data.storage import Store
from megatron_keye.errors import DataError


@dataclass(frozen=True, slots=True)
class StoredMedium:
    """An image or video of a sample. `where` says in messages which one it is."""

    store: Store
    shard: str
    span: Span
    media: Media
    item: Item
    resolved: Resolved
    variant: Variant
    where: str

    def patches(self) -> list[np.ndarray]:
        """uint8 [num_patches, 588] per attention segment, in order. Raises DataError for media that cannot be decoded."""
        blob = self.store.read(self.shard, self.span)
        check_sha256(blob, self.media, self.where)
        try:
            return load_patches(self.item, self.resolved, blob, self.variant)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error
