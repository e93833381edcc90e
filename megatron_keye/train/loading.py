"""How a replica's leader loads its samples: which source its loaders read from, made once for all data sets of a run."""

from megatron_keye.config.schema import RunConfig
from megatron_keye.data.loader import ReplicaLoader
from megatron_keye.data.media.decoder import decoder_id, open_decoder
from megatron_keye.data.mixture import MixedDataset
from megatron_keye.data.sources import Source, ThreadSource
from megatron_keye.data.workers import DecodeWorkers, SampleSet, WorkerSource
from megatron_keye.io_server.remote import RemoteSource, connect


class Loading:
    """Worker processes and the connection to I/O servers, as the settings say. `sets` are (location, data set)."""

    def __init__(self, config: RunConfig, sets: list[tuple[str, MixedDataset]], pad_id: int):
        """Raises SettingsError for settings of servers that cannot be used, and a decoder that is not installed."""
        self._data, self._pad_id = config.data, pad_id
        self.decoder_id = decoder_id(open_decoder(config.data.media.decoder))
        """Of all pixels, wherever they are made: a server with another one is not asked."""
        self._sets = [dataset for _, dataset in sets]
        self.media = connect(config.data.media, self.decoder_id)
        self.workers = None
        if config.data.loader.workers:
            described = [SampleSet(location, config.model.variant, config.data, dataset.fingerprint) for location, dataset in sets]
            self.workers = DecodeWorkers(described, config.data.loader)

    def loader(self, dataset: MixedDataset) -> ReplicaLoader:
        """A new loader of one of the data sets."""
        source = self._local_source(dataset)
        if self.media is not None:
            source = RemoteSource(dataset, self.media, source)
        return ReplicaLoader(source, pad_id=self._pad_id, skip_bad=self._data.bad_sample == "skip")

    def summary(self) -> list[str]:
        """Lines for people about where pixels came from, if not from here."""
        return [] if self.media is None else [self.media.summary()]

    def close(self) -> None:
        """End workers and connections. Loaders must have been closed."""
        if self.workers is not None:
            self.workers.close()
        if self.media is not None:
            self.media.close()

    def _local_source(self, dataset: MixedDataset) -> Source:
        if self.workers is None:
            return ThreadSource(dataset, self._data.decode_threads, dataset.bytes_read)
        return WorkerSource(self.workers, self._sets.index(dataset), dataset.sample_id)
