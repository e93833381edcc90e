"""Where a data set may lie: in a folder, or at any URL that fsspec knows."""

from pathlib import Path

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.storage import LocalStore, Store


def is_url(location: str) -> bool:
    return "://" in location


def open_store(location: str | Path, settings: StorageConfig) -> Store:
    """The store at a folder or URL. Raises DataError for a folder that is not there, SettingsError for a URL that cannot be used."""
    if not is_url(str(location)):
        return LocalStore(Path(location))
    from megatron_keye.data.remote_store import RemoteStore  # loads what folders do not need

    return RemoteStore(str(location), settings)
