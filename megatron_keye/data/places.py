"""Where the bytes of an indexed medium are: in a shard, or at a web address."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_keye.data.record import Media
from megatron_keye.data.shards import Span, check_sha256
from megatron_keye.data.storage import Store

if TYPE_CHECKING:
    from megatron_keye.data.web_media import WebMedia


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a shard; the record has its checksum."""

    store: Store
    shard: str
    span: Span

    def read(self, media: Media, where: str) -> bytes:
        """Its bytes. Raises DataError where they are not those that were indexed, and as the store does."""
        blob = self.store.read(self.shard, self.span)
        check_sha256(blob, media, where)
        return blob


@dataclass(frozen=True, slots=True)
class WebAddress:
    """What is at the address of a medium, as long as it has the checksum that it had when it was indexed."""

    web: "WebMedia"
    sha256: str

    def read(self, media: Media, where: str) -> bytes:
        """Its bytes. Raises as `WebMedia.read` does."""
        return self.web.read(media.address, self.sha256, where)


Place = Member | WebAddress
