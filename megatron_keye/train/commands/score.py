"""`keye score`: log-probabilities of the supervised tokens of given samples."""

import argparse
from pathlib import Path
from typing import get_args

from megatron_keye.config.schema import KernelConfig

HELP = """Write one line per sample, in order: id, num_tokens, num_supervised, logprob_sum and logprobs, the float32 log-probabilities of
its supervised tokens (what the assistant says, end of turn included).

The model is a run directory (its latest checkpoint), a checkpoint, or a Hugging Face folder as Keye-VL is released, read with its own
tokenizer, chat template and image limits; no code of the folder is run. Input lines are {"id", "messages"} as for training, media paths
relative to the file. A sample is scored whole: one that is too long is an error. Runs on one process."""
EXAMPLES = """\
  keye score --model runs/debug --input questions.jsonl --output scores.jsonl
  keye score --model runs/debug/checkpoints/step_00000400 --input questions.jsonl --output scores.jsonl
  keye score --model models/Keye-VL-1_5-8B --input questions.jsonl --output scores.jsonl --precision bf16 --max-tokens 16384"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", required=True, help="run directory, checkpoint, or Hugging Face folder")
    parser.add_argument("--input", metavar="FILE", type=Path, required=True, help="JSONL file of samples")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="JSONL file to write; it appears when all is done")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and activations (default: %(default)s)")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="longest sample accepted (default: what the model was made for)")
    kernels = get_args(KernelConfig.model_fields["vision_attention"].annotation)
    parser.add_argument("--vision-attention", choices=kernels, default="auto", help="attention kernel of the ViT (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from megatron_keye.data.sample_list import count_lines
    from megatron_keye.train import runtime
    from megatron_keye.train.model_source import find_model
    from megatron_keye.train.scoring import build_scorer, read_samples, write_scores

    _check_output(args.output)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = count_lines(args.input)
        reading, scoring = progress.add_task("reading", total=total), progress.add_task("scoring", total=total)
        source = find_model(args.model)
        samples = read_samples(source, args.input, args.max_tokens, lambda: progress.advance(reading))
        try:
            scorer = build_scorer(source, samples, args.precision, args.vision_attention)
            write_scores(scorer, samples, args.output, lambda: progress.advance(scoring))
        finally:
            runtime.stop()
    print(f"{args.output}: scores of {len(samples)} samples")
    return 0


def _check_output(path: Path) -> None:
    """Raises SettingsError, before any work, where the output could not be written."""
    from megatron_keye.errors import SettingsError

    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise SettingsError(f"--output {path} {found}; name a file in an existing folder")
