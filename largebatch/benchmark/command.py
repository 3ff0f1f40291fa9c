"""The `benchmark` command: measure, derive, write."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from largebatch.benchmark.cases import Case, check_images, make_rows, workers_per_rank
from largebatch.benchmark.collectives import measure_allreduce
from largebatch.benchmark.forecast import check_forecast, forecast
from largebatch.benchmark.measure import measure
from largebatch.benchmark.options import Options, check_world
from largebatch.benchmark.plots import PLOTS, draw_plots
from largebatch.benchmark.results import measurements
from largebatch.benchmark.tables import (
    Table,
    allreduce_table,
    as_csv,
    as_markdown,
    as_text,
    breakdown_table,
    machine_text,
    noise_notes,
    prediction_notes,
    prediction_table,
    scaling_table,
    tune_rule,
    tune_table,
)
from largebatch.benchmark.tune import check_tune, tune, tune_notes
from largebatch.config import Config
from largebatch.data.load import Sources, load
from largebatch.distributed.environment import Launch, Ranks
from largebatch.distributed.subgroups import Subgroups
from largebatch.errors import UserError
from largebatch.report.environment import describe_environment
from largebatch.report.files import write_json_atomically, write_text_atomically
from largebatch.run import connect_ranks
from largebatch.training.precision import slow_precision

Note = Callable[[str], None]
_FILES = ("benchmark.json", "benchmark.csv", "benchmark.md", "tune.yaml")


def benchmark(config: Config, options: Options, launch: Launch, run_dir: Path, *, command: str) -> None:
    """Measure `config` as `options` say and write `benchmark.json` and what is made of it into `run_dir`.

    `command` is what was typed after the program's name. Raises UserError for N that the launch or the config
    does not allow, before anything is started.
    """
    check_world(options, launch.world_size, command)
    make_rows(config, options)
    check_forecast(options, launch.world_size, launch.local_world_size)
    check_tune(options)
    if options.tune:
        workers_per_rank(config, options)
    if launch.rank == 0:
        _make_folder(run_dir)
    execution = config.execution
    with connect_ranks(execution, launch, group_of_one=True) as ranks:
        note: Note = _print if ranks.is_main else _silent
        slow = slow_precision(execution.precision, ranks.device)
        if slow:
            note(f"warning: {slow}")
        result = _measure_all(config, options, launch, ranks, note, command)
        if ranks.is_main:
            write(result, run_dir, note)


def _make_folder(run_dir: Path) -> None:
    """Before minutes of measuring."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir: {run_dir} cannot be made ({error.strerror}); choose another") from None


def _print(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


def _measure_all(
    config: Config, options: Options, launch: Launch, ranks: Ranks, note: Note, command: str
) -> dict[str, Any]:
    sources = load(config.data.of_one_size, seed=config.seed, device=ranks.device)
    rows = make_rows(config, options)
    check_images(config, rows, sources[0].images)
    groups = Subgroups(ranks, options.ranks)
    cases = list(dict.fromkeys(row.case for row in rows))
    measured = measure(config, cases, ranks, groups, sources, options, note)
    allreduce = measure_allreduce(options, groups, launch.local_world_size, note)
    tuned = _tune(config, options, groups, sources, note) if options.tune else None
    if not ranks.is_main:
        return {}
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "command": command,
        "config": config.model_dump(mode="json"),
        "backend": ranks.backend,
        "ranks_per_node": launch.local_world_size,
        "measured_network": options.measured_network,
        "measurements": measurements(rows, measured, launch.local_world_size),
        "allreduce": allreduce,
    }
    if tuned:
        result["tune"] = tuned
    if options.predict:
        noisy = [m for m in result["measurements"] if m["mode"] == "weak" and m["noise"]]
        result["prediction"] = None if noisy else forecast(result, options)
    return result


def _tune(config: Config, options: Options, groups: Subgroups, sources: Sources, note: Note) -> dict[str, Any] | None:
    """At the largest N; None on ranks outside it."""
    largest = options.ranks[-1]
    case = Case(largest, largest * workers_per_rank(config, options), ddp=True)
    members = groups.first(largest)
    tuned = tune(case.config(config), members, sources, options, note) if members is not None else None
    groups.sleep()
    return tuned


def write(result: dict[str, Any], run_dir: Path, note: Note) -> None:
    """`benchmark.json`, `.csv`, `.md` and the plots; the tables also to `note`."""
    _keep_earlier(run_dir, note)
    tables: dict[str, Table] = {
        "Scaling": scaling_table(result["measurements"]),
        "Where the step goes": breakdown_table(result["measurements"]),
    }
    if result["allreduce"]:
        tables["The all-reduce alone"] = allreduce_table(result["allreduce"])
    notes: dict[str, list[str]] = {}
    if "tune" in result:
        tables["Settings tried"] = tune_table(result["tune"])
        notes["Settings tried"] = [tune_rule(result["tune"])]
    noise = noise_notes(result["measurements"])
    if noise:
        notes["Scaling"] = noise
    if "prediction" in result and result["prediction"] is None:
        notes["Scaling"] = [*noise, "no prediction: it would be based on noise"]
    elif "prediction" in result:
        tables["Prediction (weak scaling)"] = prediction_table(result["prediction"])
        notes["Prediction (weak scaling)"] = prediction_notes(result["prediction"])
    write_json_atomically(run_dir / "benchmark.json", result)
    write_text_atomically(run_dir / "benchmark.csv", as_csv(result["measurements"]))
    pages = [
        "\n".join([f"## {title}", "", as_markdown(table), "", *(f"- {line}" for line in notes.get(title, [])), ""])
        for title, table in tables.items()
    ]
    head = f"`largebatch {result['command']}` on {machine_text(result['environment'])}\n\n"
    write_text_atomically(run_dir / "benchmark.md", head + "\n".join(pages))
    for title, table in tables.items():
        note("\n".join(["", title, as_text(table), *notes.get(title, [])]))
    if "tune" in result:
        settings = "\n".join(tune_notes(result["tune"]))
        write_text_atomically(run_dir / "tune.yaml", settings + "\n")
        note(f"\n{settings}")
    plots = draw_plots(result, run_dir, lambda text: note(f"warning: {text}"))
    note(f"\nwritten into {run_dir}: {', '.join([*_FILES[:3], *plots])}")


def _keep_earlier(run_dir: Path, note: Note) -> None:
    """Move what an earlier benchmark left in `run_dir` into a folder `earlier-1`, or the next number that is free."""
    earlier = [run_dir / name for name in (*_FILES, *PLOTS) if (run_dir / name).is_file()]
    if not earlier:
        return
    aside = next(folder for i in itertools.count(1) if not (folder := run_dir / f"earlier-{i}").exists())
    aside.mkdir()
    for path in earlier:
        path.rename(aside / path.name)
    note(f"the earlier result is kept in {aside}")
