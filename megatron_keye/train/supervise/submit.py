"""launch/train.sh: check a run, write down what its job will do, and submit it. The same command again goes on with the run."""

import argparse
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_keye.config.derive import require_valid
from megatron_keye.config.load import dump_config, load_config
from megatron_keye.config.schema import RunConfig
from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.train.run_dir import RunDir, write_atomically
from megatron_keye.train.supervise import slurm
from megatron_keye.train.supervise.decide import Policy
from megatron_keye.train.supervise.job import Job, Site, io_registry, io_secret
from megatron_keye.train.supervise.journal import Journal

HELP = """Submit a training run to SLURM. The same command again goes on where the run was, or says that it is queued, running or complete.

What differs between clusters is in launch/site.env (copy launch/site.env.example)."""
EXAMPLES = """\
examples:
  launch/train.sh keye_vl_1_5_8b --nodes 8 --run-dir /shared/runs/8b --set data.train=/shared/train data.tokenizer=/shared/tokenizer
  launch/train.sh keye_vl_1_5_8b --nodes 8 --run-dir /shared/runs/8b --dry-run       # shows everything, submits nothing
  launch/train.sh keye_vl_1_5_8b --nodes 8 --min-nodes 6 --spare-nodes 1 ...         # goes on with fewer nodes when some are lost
  launch/train.sh keye_vl_1_5_8b --nodes 8 --io-nodes 4 ...                          # with CPU nodes that decode for it
  launch/status.sh /shared/runs/8b                                                   # how it is doing
  touch /shared/runs/8b/STOP                                                         # ends at the next step, with a checkpoint"""


def main(argv: Sequence[str]) -> int:
    try:
        args = parser().parse_args(argv)
        job, config = make_job(args)
        if args.dry_run:
            print(described(job, args.after))
        else:
            submit(job, config, args.after)
        return 0
    except KeyeError as error:
        print(f"launch/train.sh: error: {error}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="launch/train.sh", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = made.add_argument
    add("settings", metavar="SETTINGS", help="recipe name or path of a YAML file")
    add("--nodes", type=int, default=1, metavar="N", help="nodes that train (default: 1)")
    add("--gpus-per-node", type=int, default=8, metavar="G", help="ranks of one node (default: 8)")
    add("--run-dir", metavar="DIR", help="on a file system that all nodes share (default: runs/NAME of the settings)")
    add("--set", dest="overrides", metavar="NAME=VALUE", action="extend", nargs="+", default=[], help="change settings by dotted name")
    add("--time", default="1-00:00:00", metavar="T", help="time limit of one job, as SLURM writes it (default: 1-00:00:00)")
    add("--lead-s", type=int, default=300, metavar="S", help="ask the run to stop this long before the limit (default: 300)")
    add("--min-nodes", type=int, metavar="M", help="go on with as few nodes when others are lost (default: N)")
    add("--spare-nodes", type=int, default=0, metavar="K", help="ask for K nodes more, to replace lost ones (default: 0)")
    add("--io-nodes", type=int, default=0, metavar="I", help="CPU nodes with I/O servers, in the same (heterogeneous) job (default: 0)")
    add("--preflight", choices=("off", "basic", "full"), default="basic", help="checks of the nodes before a job trains (default: basic)")
    add("--after", metavar="JOB", help="wait for the success of this job")
    add("--continues", default="", metavar="RUN_DIR", help="start from the last checkpoint of this run, which must be complete by then")
    add("--max-failures", type=int, default=20, metavar="F", help="attempts that may fail in all (default: 20)")
    add("--backoff-s", type=float, default=10.0, metavar="S", help="wait before a second try without progress, then doubled (default: 10)")
    add("--dry-run", action="store_true", help="show settings, environment and commands; submit nothing")
    return made


def make_job(args: argparse.Namespace) -> tuple[Job, RunConfig]:
    """Raises SettingsError where the settings do not fit the number of processes."""
    if args.continues:
        args.continues = str(Path(args.continues).absolute())
        args.overrides = [*args.overrides, f"model.init_from={args.continues}"]
    run_dir = Path(args.run_dir or f"runs/{Path(args.settings).stem}").absolute()
    config = load_config(args.settings, args.overrides)
    if args.io_nodes:
        args.overrides = [*args.overrides, *_own_servers(config, run_dir)]
        config = load_config(args.settings, args.overrides)
    require_valid(config, args.nodes * args.gpus_per_node)
    settings = args.settings if not Path(args.settings).exists() else str(Path(args.settings).absolute())
    overrides = ("--set", *args.overrides) if args.overrides else ()
    job = Job(
        name=f"keye-{run_dir.name}",
        root=os.environ["KEYE_ROOT"],
        run_dir=str(run_dir),
        python=os.environ["KEYE_PYTHON"],
        arguments=("train", settings, "--run-dir", str(run_dir), *overrides),
        nodes=args.nodes,
        spare_nodes=args.spare_nodes,
        gpus_per_node=args.gpus_per_node,
        time_limit=args.time,
        lead_s=args.lead_s,
        preflight=args.preflight,
        hang_s=config.train.hang_timeout_s,
        slow_phase_s=config.train.slow_phase_timeout_s,
        policy=Policy(
            node_counts=node_counts(config, args.nodes, args.min_nodes or args.nodes, args.gpus_per_node),
            max_failures=args.max_failures,
            backoff_s=args.backoff_s,
            min_time_left_s=args.lead_s + 60.0,
        ),
        io_nodes=args.io_nodes,
        io_roots=data_roots(config) if args.io_nodes else (),
        continues=args.continues,
        site=site_from_environment(os.environ),
    )
    return job, config


def _own_servers(config: RunConfig, run_dir: Path) -> tuple[str, str]:
    """Settings with which a run finds the I/O servers of its own job. Raises SettingsError where it can have none."""
    if config.data.media.servers or config.data.media.registry is not None:
        raise SettingsError("--io-nodes starts I/O servers for this run alone, and data.media names others: use one or the other")
    if config.data.media.decoder != "pyav":
        raise SettingsError(
            f"--io-nodes asks for CPU nodes, which do not decode as data.media.decoder={config.data.media.decoder} does where GPUs train: "
            "set it to pyav, or leave --io-nodes out"
        )
    return f"data.media.registry={io_registry(run_dir)}", f"data.media.secret_file={io_secret(run_dir)}"


def data_roots(config: RunConfig) -> tuple[str, ...]:
    """The folders and URLs that the run's data lie in. Raises DataError for a mixture that cannot be read."""
    from megatron_keye.data.locations import is_url  # these load what other runs do not need here
    from megatron_keye.data.mixture import read_mixture

    places = [place for place in (config.data.train, config.data.valid) if place is not None]
    paths = {part.path for place in places for part in read_mixture(place).sources}
    return tuple(sorted(path if is_url(path) else str(Path(path).absolute()) for path in paths))


def node_counts(config: RunConfig, nodes: int, min_nodes: int, gpus_per_node: int) -> tuple[int, ...]:
    """The numbers of nodes from `nodes` down to `min_nodes` with which the settings can run. Raises SettingsError without any."""
    if not 1 <= min_nodes <= nodes:
        raise SettingsError(f"--min-nodes is {min_nodes}: expected 1 to {nodes}, the number of nodes")
    counts = []
    for count in range(nodes, min_nodes - 1, -1):
        try:
            require_valid(config, count * gpus_per_node)
        except SettingsError:
            continue
        counts.append(count)
    return tuple(counts)


def site_from_environment(environment: dict[str, str]) -> Site:
    """What launch/site.env set. Raises SettingsError for values that cannot be."""
    value = {name.removeprefix("SITE_"): text for name, text in environment.items() if name.startswith("SITE_") and text}
    container = value.get("CONTAINER", "")
    if container not in ("", "pyxis", "apptainer"):
        raise SettingsError(f"SITE_CONTAINER is {container!r} in launch/site.env: expected pyxis, apptainer, or nothing")
    if container and "IMAGE" not in value:
        raise SettingsError(f"SITE_CONTAINER is {container} in launch/site.env: expected SITE_IMAGE beside it")
    cpus, io_cpus = (_count(name, value.get(name, default)) for name, default in (("CPUS_PER_NODE", "8"), ("IO_CPUS", "16")))
    return Site(
        partition=value.get("PARTITION", ""),
        account=value.get("ACCOUNT", ""),
        qos=value.get("QOS", ""),
        cpus_per_node=cpus,
        gpu_option="" if value.get("GPU_OPTION") == "none" else value.get("GPU_OPTION", "gpus-per-node"),
        container=container,
        image=value.get("IMAGE", ""),
        mounts=value.get("MOUNTS", ""),
        io_partition=value.get("IO_PARTITION", ""),
        io_cpus=io_cpus,
        sbatch_options=tuple(shlex.split(value.get("SBATCH_OPTIONS", ""))),
        srun_options=tuple(shlex.split(value.get("SRUN_OPTIONS", ""))),
    )


def _count(name: str, text: str) -> int:
    if not text.isdigit() or not int(text):
        raise SettingsError(f"SITE_{name} is {text!r} in launch/site.env: expected a number > 0")
    return int(text)


def described(job: Job, after: str | None = None) -> str:
    """What would be submitted and run."""
    nodes = [f"NODE{i}" for i in range(job.nodes)]
    batch = Path(job.root) / "launch/train.sbatch"
    parts = {
        f"{job.run_dir}/job.json": job.to_json().rstrip(),
        "submitted": shlex.join(slurm.sbatch_command(job, after=after)),
        "run by it once on each node, in launch/lib.sh's environment": shlex.join(slurm.srun_command(job, nodes)),
        **({"run by it once on each CPU node": shlex.join(slurm.io_command(job))} if job.io_nodes else {}),
        str(batch): batch.read_text(encoding="utf-8").rstrip(),
    }
    return "\n\n".join(f"# {title}\n{text}" for title, text in parts.items())


def submit(job: Job, config: RunConfig, after: str | None = None) -> str | None:
    """The job that the run is in, new or not; None where it is complete. Says which. Raises KeyeError where SLURM refuses."""
    run_dir = RunDir(job.run_dir)
    if run_dir.is_done:
        print(f"{run_dir.path} is complete; choose another --run-dir to train again")
        return None
    if queued := slurm.my_jobs().get(job.run_dir):
        ending = ", which is ending: submit again when it is gone" if queued.text.startswith("completing") else ""
        print(f"{run_dir.path} is already in job {queued.id}{ending}")
        return queued.id
    run_dir.create()
    job.save()
    write_atomically(run_dir.config, dump_config(config))
    _write_origin(job)
    if job.io_nodes:
        _make_secret(run_dir.path)
    job_id = slurm.submit(job, after=after)
    Journal(run_dir.path).submitted(job_id)
    print(f"job {job_id}: {run_dir.path}, log in {run_dir.path}/train.log")
    return job_id


def _make_secret(run_dir: Path) -> None:
    """Once for a run: servers of an earlier start may still be about."""
    io_registry(run_dir).mkdir(exist_ok=True)
    with suppress(FileExistsError):
        io_secret(run_dir).touch(mode=0o600, exist_ok=False)
        io_secret(run_dir).write_text(secrets.token_urlsafe(32) + "\n", encoding="utf-8")


def _write_origin(job: Job) -> None:
    """The revision of the program, and what was changed since."""
    for name, command in (("revision", ("rev-parse", "HEAD")), ("changes.diff", ("diff", "HEAD"))):
        done = subprocess.run(["git", "-C", job.root, *command], capture_output=True, text=True, check=False)
        write_atomically(Path(job.run_dir) / name, done.stdout if done.returncode == 0 else "not a git checkout\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
