"""Samples whose pixels come from servers, and from the local source where no server has them: the same bytes either way."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from megatron_keye.config.schema import MediaConfig, ServedMedia
from megatron_keye.contract.media import PATCH_VALUES, SampleShape
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.locations import is_url
from megatron_keye.data.places import Member, WebAddress
from megatron_keye.data.sources import LoadCounts, LoadedSample, MediaCounts, Requests, Results, Source, read_each
from megatron_keye.data.stored import StoredMedium
from megatron_keye.errors import DataError, KeyeError, SettingsError
from megatron_keye.io_server.attempts import Timeouts
from megatron_keye.io_server.auth import load_secret
from megatron_keye.io_server.client import ClientSettings, MediaClient, Poisonous
from megatron_keye.io_server.fleet import Fleet
from megatron_keye.io_server.protocol import DecodeJob, is_server_url


class RemoteMedia:
    """The connection of one replica's leader to its servers, for all of its data sets."""

    def __init__(self, client: MediaClient, own_decoder_id: str, served: ServedMedia):
        self.client, self.decoder_id, self._served = client, own_decoder_id, served

    @property
    def threads(self) -> int:
        """Samples that are worth loading at a time."""
        return self.client.settings.requests

    def can_serve(self, media: Sequence[StoredMedium]) -> bool:
        """Whether servers are asked for the media of a sample. They read data sets alone, no web addresses."""
        if any(isinstance(medium.place, WebAddress) for medium in media):
            return False
        return self._served == "all" or any(medium.item.frames is not None for medium in media)

    def summary(self) -> str:
        """One line for people about where pixels came from so far."""
        counts = self.client.counts
        text = ", ".join(f"{count} {name}" for name, count in sorted(counts.values.items())) or "none asked for"
        text = f"media from servers: {text}" + (f"; the last failure: {counts.last_failure}" if counts.last_failure else "")
        if unlike := self.client.fleet.unlike:
            text += f"; not asked, as they decode otherwise than {self.decoder_id}: {', '.join(unlike)}; `keye io-server status` says how"
        return text

    def close(self) -> None:
        self.client.close()


class RemoteSource:
    """Samples of `dataset` with their pixels from servers, and whole from `local` where no server has one of them."""

    def __init__(self, dataset: Dataset, media: RemoteMedia, local: Source):
        self._dataset, self._media, self._local = dataset, media, local
        self.sample_id = dataset.sample_id
        self.threads = media.threads
        self._lock = threading.Lock()
        self._num_samples = self._remote = self._decoded_here = 0
        self._stop: Future = Future()

    def read(self, sample: int, shape: SampleShape) -> LoadedSample:
        """As `local.read`, DataError included: a server's word that a medium is damaged is confirmed here."""
        media = self._dataset.stored_media(sample)
        if media and not self._media.can_serve(media):
            return self._read_here(sample, shape, len(media))
        patches: list[np.ndarray] = []
        for medium in media:
            segments = self._fetch(medium)
            if segments is None:
                return self._read_here(sample, shape, len(media))
            patches += segments
        with self._lock:
            self._num_samples += 1
            self._remote += len(media)
        return LoadedSample(self._dataset.tokens(sample), patches)

    def read_group(self, samples: Requests) -> Results:
        return read_each(self.read, samples)

    def counts(self) -> LoadCounts:
        """Of both ways; bytes that servers read are theirs. Failed and hedged requests are those of all sources together."""
        here, requests = self._local.counts(), self._media.client.counts.values
        media = MediaCounts(self._remote, self._decoded_here, requests["failed"], requests["hedged"])
        return LoadCounts(self._num_samples + here.samples, here.bytes_read, here.worker_failures, media)

    def close(self) -> None:
        """Also ends what servers are asked for."""
        self._stop.set_result(None)
        self._local.close()

    def _read_here(self, sample: int, shape: SampleShape, num_media: int) -> LoadedSample:
        if self._stop.done():
            raise KeyeError("the loader was closed while it read a sample")
        self._media.client.counts.add("local", num_media)
        with self._lock:
            self._decoded_here += num_media
        return self._local.read(sample, shape)

    def _fetch(self, medium: StoredMedium) -> list[np.ndarray] | None:
        job = job_of(medium, self._media.decoder_id)
        try:
            answer = self._media.client.fetch(job, self._stop)
        except Poisonous as error:
            raise DataError(f"{medium.where}: {error}; it is not decoded here either: drop it, or repair it and index again") from error
        return None if answer is None else np.split(answer.reshape(-1, PATCH_VALUES), np.cumsum(job.segments)[:-1])


def job_of(medium: StoredMedium, own_decoder_id: str) -> DecodeJob:
    """What to ask a server for."""
    if not isinstance(medium.place, Member):
        raise AssertionError(f"{medium.where} is no member of a shard, so that no server can read it")
    place, item, frames = medium.place, medium.item, medium.item.frames
    address = place.store.address(place.shard)
    is_slow_fast = frames is not None and medium.variant == "keye_vl_1_5"
    return DecodeJob(
        path=address if is_url(address) else os.path.realpath(address),
        offset=place.span.offset,
        num_bytes=place.span.num_bytes,
        sha256=medium.media.sha256,
        variant=medium.variant,
        height=item.height,
        width=item.width,
        sizes=medium.resolved.sizes,
        frames=None if frames is None else tuple(frames.numbers.tolist()),
        fast=tuple(bool(tag) for tag in frames.tags) if is_slow_fast else (),
        decoder_id=own_decoder_id,
    )


def connect(settings: MediaConfig, own_decoder_id: str) -> RemoteMedia | None:
    """The servers that the settings name, or None where they name none. Raises SettingsError for what is no URL, and a bad secret file."""
    if not settings.servers and settings.registry is None:
        return None
    strange = [url for url in settings.servers if not is_server_url(url)]
    if strange:
        raise SettingsError(f"data.media.servers has {', '.join(strange)}: expected http://HOST:PORT")
    fleet = Fleet(settings.servers, None if settings.registry is None else Path(settings.registry), own_decoder_id)
    return RemoteMedia(MediaClient(fleet, _client_settings(settings)), own_decoder_id, settings.served)


def _client_settings(settings: MediaConfig) -> ClientSettings:
    return ClientSettings(
        deadline_s=settings.deadline_s,
        hedge_after_s=settings.hedge_after_s,
        requests=settings.requests,
        in_flight_bytes=settings.in_flight_bytes,
        timeouts=Timeouts(settings.connect_timeout_s, settings.stall_timeout_s),
        secret=None if settings.secret_file is None else load_secret(Path(settings.secret_file)),
    )
