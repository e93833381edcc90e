"""Examples -> a folder with tokenizer, records, media and shards. The folder is complete or absent."""

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_keye.errors import DataError, SettingsError

from . import clips, pictures
from .example import Split
from .tasks import TASKS, Numbered, allocate, examples
from .tokenizer import write_tokenizer

TOOLS = Path(__file__).resolve().parent.parent
VARIANT = "keye_vl_1_5"
STAMP = "demo.json"
"""Written last: what the folder was made from."""
JPEG_QUALITY = 92
SHARD_BYTES = 4 << 20
"""Small, so that even this set has several shards to index at once and to read from."""


def build(out: Path, num_examples: dict[Split, int], seed: int, workers: int) -> bool:
    """Make `out`, and return whether there was anything to do.

    The set is made in a folder beside `out` and renamed when complete; what an interrupted call left there is thrown away. A set
    made from other arguments, or by another version of these files, is replaced. Raises SettingsError where `out` holds something else,
    DataError where writing the shards fails.
    """
    arguments = {"seed": seed, **num_examples}
    stamp = {"arguments": arguments, "sha256": _fingerprint(arguments)}
    if out.exists() and any(out.iterdir()):
        found = _read_stamp(out)
        if found == stamp:
            return False
        if found is None:
            raise SettingsError(f"{out} is not empty and holds no {STAMP} of a demo set; name a folder that does not exist yet")
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    write_sources(staging, num_examples, seed, workers)
    write_shards(staging, tuple(num_examples), workers)
    _write_json(staging / STAMP, stamp)
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return True


def write_sources(folder: Path, num_examples: dict[Split, int], seed: int, workers: int) -> None:
    """Write tokenizer/, tasks.json, and for each part its records, `<part>.jsonl`, and its files under media/<part>/."""
    write_tokenizer(folder / "tokenizer")
    _write_json(folder / "tasks.json", _describe_tasks(num_examples))
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with multiprocessing.get_context("spawn").Pool(workers) as pool, Progress(*columns, console=Console(stderr=True)) as progress:
        for split, number in num_examples.items():
            (folder / "media" / split).mkdir(parents=True)
            bar = progress.add_task(f"drawing {split}", total=number)
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as records:
                work = ((folder, split, numbered) for numbered in examples(split, number, seed))
                for record in pool.imap(_write_example, work, chunksize=16):
                    records.write(json.dumps(record) + "\n")
                    progress.advance(bar)


def write_shards(folder: Path, splits: tuple[Split, ...], workers: int) -> None:
    """Turn each part's records into shards with an index, by the tools that serve any data set."""
    spread = ("--workers", str(workers))
    for split in splits:
        _run_tool("make_shards.py", folder / f"{split}.jsonl", folder / split, "--shard-bytes", str(SHARD_BYTES), *spread)
        _run_tool("index_shards.py", folder / split, "--tokenizer", folder / "tokenizer", "--variant", VARIANT, *spread)


def _run_tool(name: str, *arguments: str | Path) -> None:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        raise DataError(f"`{' '.join(command)}` ended with exit code {finished.returncode}; its own message is above")


def _write_example(work: tuple[Path, Split, Numbered]) -> dict:
    """Write the media of one example and return its record, media paths relative to the folder."""
    folder, split, (task, number, example) = work
    name = f"{task}-{number:05d}"
    parts = []
    for i, part in enumerate(example.parts):
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        kind, suffix = ("video", "mp4") if isinstance(part, clips.Clip) else ("image", "jpg")
        path = f"media/{split}/{name}-{i}.{suffix}"
        if isinstance(part, clips.Clip):
            clips.encode(part, folder / path)
        else:
            pictures.draw(part).save(folder / path, quality=JPEG_QUALITY, subsampling=0)
        parts.append({"type": kind, kind: path})
    record = {"id": f"{split}-{name}", "task": task}
    if example.answer is None:
        return record | {"document": parts}
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": example.answer}]
    return record | {"answer": example.answer, "messages": messages}


def _describe_tasks(num_examples: dict[Split, int]) -> dict:
    """Per task: how many examples each part has, and what guessing from the question alone scores (null for documents)."""
    counts = {split: allocate(number) for split, number in num_examples.items()}
    return {task.name: {"chance": task.chance} | {split: counts[split][task.name] for split in counts} for task in TASKS}


def _fingerprint(arguments: dict) -> str:
    """sha256 over the arguments and the source files of the demo set."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_stamp(folder: Path) -> dict | None:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
