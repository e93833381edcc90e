"""Media of records that are in no shard yet: in files, at web addresses, or in the record itself."""

import base64
import binascii
import hashlib
from pathlib import Path

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.record import Media
from megatron_keye.data.web_media import shown, web_bytes
from megatron_keye.errors import DataError


def media_bytes(media: Media, folder: Path, where: str, storage: StorageConfig) -> bytes:
    """Bytes of a medium that is not in a shard; a relative path is taken from `folder`, a web address is fetched as `storage` says.

    Raises DataError where there are none, or not those of the checksum of `media`, where it has one.
    """
    blob = _bytes(media, folder, where, storage)
    if media.sha256 is not None and hashlib.sha256(blob).hexdigest() != media.sha256:
        address = shown(media.address) if media.origin == "web" else media.address
        raise DataError(
            f"{where}: the bytes of {address:.200} do not have their sha256: damaged, or another {media.kind}; restore them, or "
            "correct the record"
        )
    return blob


def _bytes(media: Media, folder: Path, where: str, storage: StorageConfig) -> bytes:
    if media.origin == "inline":
        return _inline_bytes(media.address, where)
    if media.origin == "member":
        raise DataError(f"{where}: found the member {media.address!r}, but the record is not in a shard; give a path or a data URI")
    if media.origin == "web":
        return web_bytes(media.address, where, storage)
    path = folder / media.address
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot read {path}: {error.strerror or error}; paths are relative to the JSONL file") from error
    if not blob:
        raise DataError(f"{where}: {path} is empty; restore or remove it")
    return blob


def _inline_bytes(address: str, where: str) -> bytes:
    head, comma, payload = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{where}: found the data URI {head:.60}, expected data:TYPE;base64,...; write the bytes in base64")
    try:
        blob = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: found a data URI whose base64 is damaged ({error}); write it again") from error
    if not blob:
        raise DataError(f"{where}: found an empty data URI, expected the bytes of a medium")
    return blob
