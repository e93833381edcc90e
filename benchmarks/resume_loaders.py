"""Four loaders behind one face for `resume.py`: open, go on from a state, yield batches of sample numbers, give a state.

Each reads its samples' texts; Energon, which needs one to go on at another number of ranks, in a worker process, the others in this
one. `states` are those of all ranks, in the order of ranks, as a run would find
them in a checkpoint: a loader whose state is one for all ranks takes the first, the others that of their own rank, if there is one.
"""

import json
import os
import pickle
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from benchmarks.energon_set import prepare
from benchmarks.tiny_set import VARIANT, record_text, tiny_config
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.plan.cursor import Cursor, ResumeState
from megatron_keye.train.loading import Loading
from megatron_keye.train.placement import Planner

GLOBAL_BATCH = 64
MICROBATCH = 16
"""Of the others, whatever the number of ranks: Energon refuses to go on with a larger one."""


class Loader(Protocol):
    """One rank's end of a loader."""

    def __init__(self, folder: Path, rank: int, world: int, states: Sequence[Any]): ...

    def __iter__(self) -> Iterator[list[int]]: ...

    def state(self) -> Any: ...


def ready_set(folder: Path, name: str, num_samples: int) -> None:
    """Make what a loader wants beside our shards and index, once."""
    if name == "energon":
        prepare(folder / "shards")
    if name == "streaming" and not (folder / "mds").exists():
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"number": "int", "text": "bytes"}) as writer:
            for number in range(num_samples):
                writer.write({"number": number, "text": record_text(number)})


class Ours:
    def __init__(self, folder: Path, rank: int, world: int, states: Sequence[str]):
        config = tiny_config(folder, "data.loader.workers=0")
        tokenizer = load_tokenizer(config.data.tokenizer, VARIANT)
        dataset = open_samples(config.data.train, tokenizer, VARIANT, config.data)
        wanted = dataset.mixture(config.data, config.train.seed)
        self._resume = ResumeState.from_json(states[0]).going_on(wanted) if states else ResumeState(Cursor(), wanted)
        self._plan_at = Planner(config, world).over(dataset.plan_data, self._resume.mixture.order())
        self._loader = Loading(config, [(config.data.train, dataset)], tokenizer.specials.endoftext).loader(dataset)
        self._cursor, self._rank = self._resume.cursor, rank

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            plan, after = self._plan_at(self._cursor)
            share = plan.replicas[self._rank]
            self._loader.load(share)
            self._cursor = after
            yield [document.sample for row in share.rows for document in row.documents]

    def state(self) -> str:
        return ResumeState(self._cursor, self._resume.mixture).to_json()

    def state_at(self, position: int) -> str:
        """What `state` gives after `position` samples: batches of a run without lookahead leave nothing else behind."""
        return ResumeState(Cursor(position // GLOBAL_BATCH, position), self._resume.mixture).to_json()


class Energon:
    """Shards shuffled, and samples within a buffer of 100."""

    def __init__(self, folder: Path, rank: int, world: int, states: Sequence[Any]):
        from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset, stateless

        class Encoder(DefaultTaskEncoder):
            decoder = None
            cookers = (Cooker(stateless(_number_of)),)

            def batch(self, samples):
                return [sample["number"] for sample in samples]

        dataset = get_train_dataset(
            folder / "shards", worker_config=WorkerConfig(rank=rank, world_size=world, num_workers=1),
            batch_size=MICROBATCH, shuffle_buffer_size=100, max_samples_per_sequence=100, repeat=False,
            task_encoder=Encoder(),
        )  # fmt: skip
        self._loader = get_savable_loader(dataset)
        if rank < len(states):
            self._loader.restore_state_rank(states[rank])

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._loader)

    def state(self) -> Any:
        return self._loader.save_state_rank()


class Streaming:
    def __init__(self, folder: Path, rank: int, world: int, states: Sequence[dict]):
        from streaming import StreamingDataLoader, StreamingDataset

        # It reads its place from the environment, as torchrun sets it.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=MICROBATCH)
        self._loader = StreamingDataLoader(dataset, batch_size=MICROBATCH, num_workers=0, collate_fn=_numbers)
        if states:
            self._loader.load_state_dict(states[0])

    def __iter__(self) -> Iterator[list[int]]:
        return (numbers.tolist() for (numbers,) in self._loader)

    def state(self) -> dict:
        return self._loader.state_dict()

    def state_at(self, position: int) -> dict:
        return self.state() | {"sample_in_epoch": position}


class Torchdata:
    """A map-style set of records read at their offsets, and a distributed sampler."""

    def __init__(self, folder: Path, rank: int, world: int, states: Sequence[dict]):
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        records = _Records(folder)
        sampler = StatefulDistributedSampler(records, num_replicas=world, rank=rank)
        self._loader = StatefulDataLoader(records, batch_size=MICROBATCH, sampler=sampler, collate_fn=list)
        if rank < len(states):
            self._loader.load_state_dict(states[rank])

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._loader)

    def state(self) -> dict:
        return self._loader.state_dict()


class _Records:
    def __init__(self, folder: Path):
        config = tiny_config(folder)
        tokenizer = load_tokenizer(config.data.tokenizer, VARIANT)
        self._dataset = open_samples(config.data.train, tokenizer, VARIANT, config.data)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> int:
        return int(self._dataset.record(number).id)


def _number_of(sample: dict) -> dict:
    from megatron.energon import basic_sample_keys

    return basic_sample_keys(sample) | {"number": int(json.loads(sample["json"])["id"])}


def _numbers(samples: list[dict]):
    import torch

    return (torch.tensor([sample["number"] for sample in samples]),)


def state_bytes(state: Any) -> int:
    """Its size in a checkpoint: as JSON where it is that, else pickled, as these libraries' users store it."""
    try:
        return len(state if isinstance(state, str) else json.dumps(state))
    except TypeError:
        return len(pickle.dumps(state))


def loaders() -> dict[str, type]:
    """Those that can run here, by name."""
    found = {"ours": Ours, "streaming": Streaming, "energon": Energon, "torchdata": Torchdata}
    needs = {"streaming": "streaming", "energon": "megatron.energon", "torchdata": "torchdata"}
    return {name: loader for name, loader in found.items() if name not in needs or find_spec(needs[name])}
