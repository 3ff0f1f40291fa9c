"""The commands. The only reader of sys.argv; torch is imported only by the commands that need it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from largebatch.arguments import ConfigFile, Overrides, folder_name
from largebatch.errors import (
    EXIT_OK,
    EXIT_USER_INPUT,
    ConfigError,
    HealthError,
    Preempted,
    RanksLost,
    UserError,
)
from largebatch.use.commands import evaluate, export, predict

app = typer.Typer(
    name="largebatch",
    help="Large-minibatch SGD (Goyal et al. 2017) whose result does not depend on how many processes ran it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _Benchmark(typer.core.TyperGroup):
    """`benchmark CONFIG` measures, so what names no other command is a config."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


benchmark_app = typer.Typer(
    cls=_Benchmark,
    help="Measure a CONFIG (see `benchmark run --help`), or compare two results.",
    no_args_is_help=True,
)
config_app = typer.Typer(help="List or show configs, or print their JSON Schema.", no_args_is_help=True)
data_app = typer.Typer(help="Download, pack or index data sets.", no_args_is_help=True)
reproduce_app = typer.Typer(help="The paper's comparisons: run, watch and report them.", no_args_is_help=True)
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(reproduce_app, name="reproduce")


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="A YAML file, or a name of `config list`; not with --replay.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(parser=folder_name, help="The run folder.  [default: runs/<config name>]")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="RUN", parser=folder_name, help="Repeat a finished run whose steps left workers out."),
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never", help="Resume from the run folder, or start over.")
    ] = "auto",
) -> None:
    """Train. Start it by itself, with torchrun, or with srun: the result is the same for any number of ranks."""
    if resume not in ("auto", "never"):
        raise UserError(f"--resume: {resume!r} is not one of 'auto', 'never'")
    name = config.stem if config is not None else ""
    if replay is not None:  # the first word is an override then
        overrides = [*([str(config)] if config is not None else []), *(overrides or [])]
        config, name = replay / "config.yaml", f"{replay.resolve().name}_replay"
    if config is None:
        raise UserError("Missing argument 'CONFIG'.")
    loaded = _load(config, overrides)
    from largebatch.distributed.environment import read_launch
    from largebatch.run import train as run_training

    folder = run_dir or Path("runs") / name
    if overrides and (folder / "config.yaml").resolve() == config.resolve():
        raise UserError(
            f"--run-dir: {folder}/config.yaml is the config that is given, and would be overwritten with the overrides "
            f"({' '.join(overrides)}); write them into it, or give another folder"
        )
    launch = read_launch()
    summary = run_training(loaded, folder, name=name, resume=resume, launch=launch, replay=replay)
    if launch.rank == 0:
        print(
            f"finished: top-1 error {summary['top1_error']:.2f} % (median of the last 5 evaluations "
            f"{summary['top1_error_median_last5']:.2f} %), {summary['steps']} steps, {summary['seconds']:.0f} s, "
            f"{summary['images_per_second']:.0f} images/s{_left_out(summary)}; see {folder}"
        )


def _left_out(summary: dict[str, Any]) -> str:
    skipped = summary.get("skipped_steps", 0)
    return f"; {skipped} updates were skipped" if skipped else ""


for _command in (evaluate, predict, export):
    app.command()(_command)


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML config, unless --from.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(help="Number of ranks N to plan for.", min=1)] = 1,
    run: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            parser=folder_name,
            help="Plan a run folder's config, and its useful minibatch sizes.",
        ),
    ] = None,
    speeds: Annotated[
        str | None, typer.Option(metavar="1,1,0.5", help="Relative speeds of the ranks: how workers would be dealt.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of text.")] = False,
) -> None:
    """Explain a config: minibatch, learning rate and why, steps, and which rank runs what."""
    from largebatch.plan import dealt_by_speed, describe, describe_deal, describe_limit, make_plan

    by_rank = _speeds(speeds, ranks)
    ranks = len(by_rank) or ranks

    if run is not None and config is None:
        config = run.resolve() / "config.yaml"
    elif config is None or run is not None:
        raise UserError("give either a CONFIG to plan, or --from RUN, a run folder that measured its noise scale")
    loaded = _load(config, overrides).for_ranks(ranks)
    train_images, val_images = _images_of(loaded)
    name = config.parent.name if run else config.stem
    made = make_plan(loaded, name=name, world_size=ranks, train_images=train_images, val_images=val_images)
    values = made.as_dict()
    text = describe(made)
    if run is not None:
        from largebatch.report.noise import read_noise_scale

        whole, thirds = read_noise_scale(run)
        values["gradient_noise_scale"] = whole.images
        text += "\n" + describe_limit(made, whole, thirds)
    if by_rank:
        values["dealt_by_speed"] = dealt = dealt_by_speed(made, by_rank)
        text += "\n" + describe_deal(dealt)
    print(json.dumps(values, indent=2) if as_json else text)


def _speeds(text: str | None, ranks: int) -> list[float]:
    """The ranks' speeds in ``1,1,0.5``; none where nothing is given."""
    try:
        speeds = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        speeds = [0.0]
    if not all(1e-3 <= speed <= 1e3 for speed in speeds):
        raise UserError(
            f"--speeds: {text!r} is not a list of numbers from 0.001 to 1000, one per rank, such as 1,1,0.5"
        )
    if speeds and ranks not in (1, len(speeds)):
        raise UserError(
            f"--speeds: {text!r} are those of {len(speeds)} ranks, and --ranks says {ranks}; give one of them"
        )
    return speeds


@benchmark_app.command("diff")
def benchmark_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a benchmark, or its JSON.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The benchmark to compare with A.", show_default=False)],
) -> None:
    """Two benchmarks side by side: ratios with their spread, and what differs in config and environment."""
    from largebatch.benchmark.diff import compare

    print(compare(first, second))


@benchmark_app.command("run")
def benchmark(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="1,2,4", help="Numbers of ranks.  [default: 1, 2, 4, ... all]")
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="weak|strong|both", help="weak keeps n and k/N, strong keeps kn.")
    ] = "weak",
    workers_per_rank: Annotated[
        int | None, typer.Option(min=1, help="Virtual workers of a rank in weak scaling.  [default: k / largest N]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="How many times each window is measured.")] = 7,
    window_seconds: Annotated[float, typer.Option(min=0.01, help="Minimum length of a window.")] = 0.4,
    tune: Annotated[bool, typer.Option("--tune", help="Also try settings at the largest N.")] = False,
    predict: Annotated[str, typer.Option(metavar="64,256", help="Also predict these N.")] = "",
    network: Annotated[str | None, typer.Option(metavar="RATE", help="Network of the predicted nodes: 50gbit.")] = None,
    measured_network: Annotated[
        str | None, typer.Option(metavar="RATE", help="Nominal rate of the network that is measured.")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on a predicted node.  [default: as measured]")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(parser=folder_name, help="Results.  [default: runs/benchmark_<config name>]")
    ] = None,
) -> None:
    """Measure how training scales from 1 to N ranks, where the time goes, and what more ranks would achieve."""
    from largebatch.benchmark.options import MODES, Options, default_counts, parse_counts, parse_rate

    if mode not in MODES:
        raise UserError(f"--mode: {mode!r} is not one of {', '.join(MODES)}")
    counts = parse_counts(ranks, "--ranks") if ranks else ()
    predicted = parse_counts(predict, "--predict") if predict else ()
    rates = [
        parse_rate(rate, name) if rate else None
        for rate, name in ((network, "--network"), (measured_network, "--measured-network"))
    ]
    loaded = _load(config, overrides)
    from largebatch.benchmark.command import benchmark as run_benchmark
    from largebatch.distributed.environment import read_launch

    launch = read_launch()
    options = Options(
        ranks=counts or default_counts(launch.world_size),
        mode=mode,
        workers_per_rank=workers_per_rank,
        rounds=rounds,
        window_seconds=window_seconds,
        tune=tune,
        predict=predicted,
        network=rates[0],
        measured_network=rates[1],
        ranks_per_node=ranks_per_node,
    )
    folder = run_dir or Path("runs") / f"benchmark_{config.stem}"
    run_benchmark(loaded.for_ranks(launch.world_size), options, launch, folder, command=shlex.join(sys.argv[1:]))


@app.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="How many first steps to compare.")] = 8,
    run_dir: Annotated[
        Path | None, typer.Option(parser=folder_name, help="For verify.json.  [default: runs/verify_<config name>]")
    ] = None,
) -> None:
    """Check that a config's first steps give the same bits on 1, 2, ... N ranks and for any deal of its workers.

    Start it with torchrun or srun, like benchmark. Names the module behind a difference and exits with status 3.
    """
    loaded = _load(config, overrides)
    from largebatch.distributed.environment import read_launch
    from largebatch.verify import verify as run_verify

    launch = read_launch()
    run_verify(loaded.for_ranks(launch.world_size), steps, launch, run_dir or Path("runs") / f"verify_{config.stem}")


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="Also check what this config needs.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[Path, typer.Option(parser=folder_name, help="Where run folders will be.")] = Path("runs"),
    ranks: Annotated[int | None, typer.Option(help="Ranks on this machine.  [default: its GPUs]", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> int:
    """Check this machine: software, GPUs, network, memory, disk, loader. Exit status 1 if there is an error."""
    loaded = _load(config, overrides) if config is not None else None
    from largebatch.doctor.examine import examine

    findings = []
    for finding in examine(loaded and loaded.for_ranks(ranks or 1), run_dir, ranks):
        findings.append(finding)
        if not as_json:
            print(finding.line(), flush=True)
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2, ensure_ascii=False))
    return int(any(finding.level == "error" for finding in findings))


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole config, every default filled in."""
    from largebatch.configfile.loading import dump_config

    print(dump_config(_load(config, overrides)), end="")


@config_app.command("list")
def config_list() -> None:
    """List the configs and experiments that come with largebatch, by the names that commands take."""
    from largebatch.configfile.shipped import shipped_configs, shipped_experiments

    for title, command, known in (
        ("Configs", "train NAME", shipped_configs()),
        ("Experiments", "reproduce run NAME", shipped_experiments()),
    ):
        print(f"{title} (largebatch {command}):")
        for name, summary in known.items():
            print(f"  {name:<{max(map(len, known))}}  {summary}")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of all configs, for editors."""
    from largebatch.config import Config

    schema = Config.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another config that this one changes.",
    }
    print(json.dumps(schema, indent=2))


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="fashion-mnist, mnist or cifar10.", show_default=False)],
    root: Annotated[Path, typer.Option(help="The folder for data sets (data.root of a config).")] = Path("data"),
) -> None:
    """Download a data set and verify its checksums; does nothing if it is already there."""
    from largebatch.data.fetch import fetch

    fetch(name, root)


@data_app.command("pack")
def data_pack(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of train/CLASS/ and val/CLASS/.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", parser=folder_name, help="Folder for the shards.")],
    jobs: Annotated[int | None, typer.Option(min=1, help="Shards at a time.  [default: the cores]")] = None,
    images_per_shard: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 4096,
    restart_markers: Annotated[
        bool, typer.Option("--restart-markers", help="Code JPEGs anew, without loss, to read crops faster.")
    ] = False,
) -> None:
    """Pack a folder of images into tar shards with an index (data.name: shards); the same command resumes.

    Training from the shards gives the same bits as from the folder. WebDataset reads them too.
    """
    from largebatch.data.pack import pack

    pack(
        source,
        dest,
        jobs=jobs or _cores(),
        images_per_shard=images_per_shard,
        restart_markers=restart_markers,
        report=_say,
    )


@data_app.command("index")
def data_index(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of train/*.tar and val/*.tar.")],
    class_names: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the classes, one per line.  [default: their numbers]")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Shards at a time.  [default: the cores]")] = None,
) -> None:
    """Make the index that `data.name: shards` needs for WebDataset shards of images and class numbers."""
    from largebatch.data.webdataset import index

    index(root, jobs=jobs or _cores(), class_names=class_names, report=_say)


def _say(line: str) -> None:
    print(line, flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Experiments = Annotated[
    list[str],
    typer.Argument(metavar="EXPERIMENT...", help="Names of `config list`, or YAML files.", show_default=False),
]
ScaleName = Annotated[str, typer.Option("--scale", metavar="smoke|cpu|gpu|paper", help="Size of the experiment.")]
RunsFolder = Annotated[Path, typer.Option("--out", parser=folder_name, help="Where the run folders are.")]


@reproduce_app.command("run")
def reproduce_run(
    experiments: Experiments,
    scale: ScaleName = "smoke",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time.  [default: one for each GPU or core]")
    ] = None,
    out: RunsFolder = Path("runs/reproduce"),
    launcher: Annotated[
        str, typer.Option(metavar="local|slurm", help="Run here, or submit a Slurm array of the runs.")
    ] = "local",
) -> int:
    """Train the unfinished runs; after a kill the same command resumes. Exit status 1 if a run failed."""
    from largebatch.reproduce.command import run, submit

    if launcher not in ("local", "slurm"):
        raise UserError(f"--launcher: {launcher!r} is not one of local, slurm")
    return (run if launcher == "local" else submit)(experiments, _scale(scale), out, jobs)


@reproduce_app.command("status")
def reproduce_status(
    experiments: Experiments, scale: ScaleName = "smoke", out: RunsFolder = Path("runs/reproduce")
) -> None:
    """Show the state of every row; works at any time."""
    from largebatch.reproduce.command import status

    status(experiments, _scale(scale), out)


@reproduce_app.command("report")
def reproduce_report(
    experiments: Experiments,
    scale: ScaleName = "smoke",
    out: RunsFolder = Path("runs/reproduce"),
    into: Annotated[Path, typer.Option(parser=folder_name, help="Where reports go.")] = Path("results/reproduce"),
    readme: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also update the block between this file's markers.")
    ] = None,
    from_json: Annotated[
        bool, typer.Option("--from-json", help="From the JSON of an earlier report instead of runs.")
    ] = False,
) -> None:
    """Write tables, plots and the JSON behind them from the runs that have ended."""
    from largebatch.reproduce.command import report

    report(experiments, _scale(scale), out, into, readme, from_json=from_json)


def _scale(name: str) -> Any:
    from largebatch.reproduce.settings import SCALES

    if name not in SCALES:
        raise UserError(f"--scale: {name!r} is not one of {', '.join(SCALES)}")
    return name


def _load(config: Path, overrides: list[str] | None) -> Any:
    from largebatch.config import read_config, scaled_times

    config = Path(os.path.expanduser(config))
    loaded = read_config(config, overrides or [])
    scaled = scaled_times(config, overrides or [])
    if scaled and _from_launcher("RANK", "SLURM_PROCID") in (None, "0"):
        _complain(f"schedule.epochs is set alone, so the rest of the schedule is scaled with it: {' '.join(scaled)}")
    return loaded


def _images_of(config: Any) -> tuple[int, int]:
    """Training and validation images: a fact for known sets, else read from the disk."""
    from largebatch.data.catalog import known_set

    known = known_set(config.data)
    if known is not None:
        return known.train_images, known.val_images
    import torch

    from largebatch.data.load import load

    train_source, validation = load(config.data, seed=config.seed, device=torch.device("cpu"))
    return train_source.images, validation.images


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 done, 2 the user's input is wrong, 3 stopped by health, 75 preempted with a checkpoint written. It is also left in
    the file LARGEBATCH_STATUS_FILE.<rank> where that variable is set: torchrun exits with 1 whatever its ranks did.
    """
    threading.excepthook = _leave_with_message
    status = _run(arguments)
    _leave_status(status)
    return status


_SECONDS_TO_SPEAK = 5.0


def program() -> NoReturn:
    """`main` as a process of its own, which waits for no rank that hangs, nor lets NCCL wait, once it has failed."""
    status = main()
    if status != EXIT_OK and _from_launcher("RANK", "SLURM_PROCID") is not None:
        sys.stdout.flush()
        if status == EXIT_USER_INPUT and _from_launcher("LOCAL_RANK", "SLURM_LOCALID") != "0":
            # A launcher ends all ranks once one has failed, perhaps before the one that says why has said it.
            time.sleep(_SECONDS_TO_SPEAK)
        os._exit(status)
    sys.exit(status)


def _leave_with_message(raised: threading.ExceptHookArgs) -> None:
    """For a thread that ends the process, since the main thread waits for a rank that hangs."""
    if isinstance(raised.exc_value, RanksLost):
        _complain(str(raised.exc_value))
        _leave_status(raised.exc_value.exit_status)
        sys.stdout.flush()
    else:
        threading.__excepthook__(raised)


def _leave_status(status: int) -> None:
    left = os.environ.get("LARGEBATCH_STATUS_FILE")
    if left:
        with contextlib.suppress(OSError):
            Path(f"{left}.{_from_launcher('RANK', 'SLURM_PROCID') or 0}").write_text(f"{status}\n", encoding="ascii")


def _run(arguments: list[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no "§" is no reason to stop
        sys.stdout = _Tolerant(sys.stdout)
    if "" not in sys.path:
        sys.path.insert(0, "")  # as under `python -m`: a user's own module lies in the current folder
    try:
        status = app(args=arguments, standalone_mode=False)
        return status if isinstance(status, int) else EXIT_OK
    except (UserError, HealthError, Preempted, RanksLost) as error:
        # What is wrong with the config is wrong on every rank alike: the first one of each machine says it.
        if not isinstance(error, ConfigError) or _from_launcher("LOCAL_RANK", "SLURM_LOCALID") in (None, "0"):
            _complain(str(error))
        return error.exit_status
    except typer.Exit as exit_:
        return exit_.exit_code
    except typer.Abort:
        command = arguments if arguments is not None else sys.argv[1:]
        kept = "; the same command resumes from the newest checkpoint"
        _complain(f"interrupted{kept if command[:1] == ['train'] else ''}")
        return 130
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's own errors of usage
        if usage is not None:
            _complain(f"{usage()} (see --help)")
            return EXIT_USER_INPUT
        if _is_out_of_memory(error):
            _complain(
                f"out of memory: {str(error).splitlines()[0]}\nRun fewer images at once (execution.workers_per_pass, "
                "batch.images_per_worker, evaluation.images_per_batch), use a smaller model or execution.precision=bf16"
            )
            return EXIT_USER_INPUT
        _complain(traceback.format_exc())
        return 1


class _Tolerant(io.TextIOBase):
    """Standard output that may be closed (`| head`) or on a full disk: no reason to end a training."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        with self._without_failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_failing():
            self._stream.flush()

    @contextlib.contextmanager
    def _without_failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _complain(f"warning: standard output cannot be written ({error.strerror}); nothing more is printed there")
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also for what Python flushes at its end


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine has no memory left; torch's allocator for CPUs says so in words alone."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


def _complain(text: str) -> None:
    """Print to standard error, each line prefixed with the rank where there are several."""
    rank = _from_launcher("RANK", "SLURM_PROCID")
    prefix = f"[rank {rank}] " if rank is not None else ""
    lines = "".join(f"{prefix}{line}\n" for line in text.rstrip().splitlines())
    with contextlib.suppress(OSError):  # no one is left to read it
        print(lines, end="", file=sys.stderr, flush=True)


def _from_launcher(torchrun: str, slurm: str) -> str | None:
    """The variable that torchrun or Slurm set for one of several ranks; None for a process alone."""
    for name, size in ((torchrun, "WORLD_SIZE"), (slurm, "SLURM_STEP_NUM_TASKS")):
        if size in os.environ:
            return os.environ.get(name) if os.environ[size] != "1" else None
    return None
