"""A folder of shards as Megatron-Energon wants it: its own index beside ours, made once."""

import subprocess
import sys
from pathlib import Path

ENERGON_FOLDER = ".nv-meta"


def prepare(folder: Path) -> Path:
    """`folder`, after `energon prepare` has been through it."""
    if not (folder / ENERGON_FOLDER / "dataset.yaml").exists():
        options = (
            "--non-interactive",
            "--no-progress",
            "--split-parts",
            "train:.*",
            "--sample-type",
            "CrudeWebdataset",
            "--num-workers",
            "1",
        )
        command = (sys.executable, "-m", "megatron.energon.cli.main", "prepare", *options, str(folder))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder
