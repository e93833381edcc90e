"""Conversion against copying the same files, side by side, and the memory that it takes.

    python -m benchmarks.convert --folder /data/scratch --layers 4

Writes random bfloat16 weights in the layout of Keye-VL-1.5-8B with fewer decoder layers (4 layers: 5 GB), then, in turn, copies the files
(read, write, flush to disk), converts them to a checkpoint, and that back. Needs four times the size on disk; removes everything.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models

from megatron_keye.checkpoint.convert import export_hf, import_hf
from megatron_keye.checkpoint.files import TensorSpec
from megatron_keye.checkpoint.hf_config import make_hf_config
from megatron_keye.checkpoint.hf_weights import write_hf_weights
from megatron_keye.checkpoint.tensors import total_bytes
from megatron_keye.config.load import load_config
from megatron_keye.config.schema import ModelConfig
from megatron_keye.contract.tokens import COMMON_NAMES, FRAME_NAMES
from megatron_keye.model.tensors import canonical_shapes

SHARD_BYTES = 5_000_000_000
SAMPLE_S = 0.005


class RandomTensors:
    """Random bits, drawn once and repeated: compressing file systems and caches must not help."""

    def __init__(self, model: ModelConfig):
        self.specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in canonical_shapes(model).items()}
        self._noise = torch.randn(1 << 24).bfloat16()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        columns = max(1, self.specs[name].num_bytes // 2 // self.specs[name].shape[0])
        numel = (stop - start) * columns
        return self._noise.repeat(-(-numel // len(self._noise)))[:numel].view(stop - start, columns)


def write_model(folder: Path, num_layers: int) -> int:
    """A Hugging Face folder; bytes of its tensors."""
    model = load_config("keye_vl_1_5_8b").model
    model = model.model_copy(update={"decoder": model.decoder.model_copy(update={"num_layers": num_layers})})
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (*COMMON_NAMES.values(), *FRAME_NAMES.values())])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(make_hf_config(model, tokenizer.get_vocab(), 131072)))
    source = RandomTensors(model)
    write_hf_weights(folder, source, SHARD_BYTES)
    return total_bytes(source.specs)


def copy(source: Path, output: Path) -> None:
    """Every file, flushed to disk."""
    output.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, output / path.name)
        with open(output / path.name, "rb+") as file:
            os.fsync(file.fileno())


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def measured(kind: str, source: Path, output: Path) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak of anonymous memory in bytes) of one way to write `output`, in this process."""
    ways = {
        "copy": lambda: copy(source, output),
        "hf-to-megatron": lambda: import_hf(source).write(output),
        "megatron-to-hf": lambda: export_hf(source, SHARD_BYTES).write(output),
    }
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    ways[kind]()
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    done.set()
    thread.join()
    return took_s, cpu_s, peak


def run(kind: str, source: Path, output: Path) -> tuple[float, float, int]:
    """`measured` in a process of its own, after what is still to be written is on disk and the memory for new files has been touched:
    memory that a virtual machine has given back to its host is slow to get again, and would be paid by whoever comes first."""
    os.sync()
    torch.ones(sum(path.stat().st_size for path in source.rglob("*") if path.is_file()), dtype=torch.uint8)
    command = [sys.executable, "-m", "benchmarks.convert", "--measure", kind, str(source), str(output)]
    seconds, cpu_s, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(cpu_s), int(peak)


def compare(folder: Path, num_layers: int, repeats: int) -> None:
    num_bytes = write_model(folder / "hf", num_layers)
    print(f"{num_bytes / 1e9:.2f} GB of tensors; ratios are of the speed of copying, in the same round")
    ratios: dict[str, list[float]] = {"hf-to-megatron": [], "megatron-to-hf": []}
    for number in range(repeats):
        copy_s, copy_cpu_s, _ = run("copy", folder / "hf", folder / "copy")
        shutil.rmtree(folder / "copy")
        line = [f"round {number + 1}: copy {num_bytes / copy_s / 1e6:,.0f} MB/s ({copy_cpu_s:.1f} CPU s)"]
        for kind, source, output in (("hf-to-megatron", "hf", "checkpoint"), ("megatron-to-hf", "checkpoint", "back")):
            took_s, cpu_s, peak = run(kind, folder / source, folder / output)
            ratios[kind].append(copy_s / took_s)
            line.append(f"{kind} {copy_s / took_s:.2f} ({cpu_s:.1f} CPU s, anonymous memory {peak / 1e6:,.0f} MB)")
        for output in ("checkpoint", "back"):
            shutil.rmtree(folder / output)
        print(", ".join(line), flush=True)
    print("medians: " + ", ".join(f"{kind} {statistics.median(values):.2f}" for kind, values in ratios.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("convert_benchmark"), help="is made and removed (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the model (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, source, output = arguments.measure
        print(*measured(kind, Path(source), Path(output)))
        return
    arguments.folder.mkdir(parents=True)
    try:
        compare(arguments.folder, arguments.layers, arguments.repeats)
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
