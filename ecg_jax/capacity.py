"""`ecg-jax capacity`: what a cluster's disks and network must deliver at a measured rate, and how long a rung takes."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ecg_jax.config_flags import load_config
from ecg_jax.data.ladder import SIZES
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.studies import capacity
from ecg_jax.studies.capacity import Cluster
from ecg_jax.studies.efficiency_report import aligned, markdown

DESCRIPTION = """\
Works out, from windows per second of one device, what clusters need from disks and network, and how long each rung of
the pretraining ladder takes on them. Nothing is measured here: the rates come from `ecg-jax efficiency`, or from you.

  ecg-jax efficiency --output=runs/efficiency --backbones=s4 --objectives=cpc --precisions=bfloat16 --batch=256
  ecg-jax capacity runs/efficiency/efficiency.json --clusters=1x1,8x1,256x32
  ecg-jax capacity --windows-per-s=20000,60000 --parameters=3194880 --batch=64
"""

_CLUSTERS = "1x1,8x1,256x32"
#: Beyond what can be, and far from where floats end.
_MOST = 1e12
_CLUSTER = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")


class Source(NamedTuple):
    """A model and how fast one device pretrains it."""

    model: str
    rate: float
    """Windows a second."""
    batch: int
    """Windows of a device in a step."""
    parameters: int
    window_s: float


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with `clusters` as `Cluster`s and `sources` as `Source`s.

    Raises:
        UserError: a value that cannot be.
    """
    parser = argparse.ArgumentParser(
        prog="ecg-jax capacity",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("measured", nargs="?", type=Path, metavar="efficiency.json", help="written by `ecg-jax efficiency`")
    add("--windows-per-s", metavar="N,M", help="of one device, instead of a file")
    add("--parameters", type=int, metavar="N", help="trainable ones, with --windows-per-s")
    add("--batch", type=int, metavar="N", help="windows of one device in a step, with --windows-per-s")
    add(
        "--clusters",
        default=_CLUSTERS,
        metavar="DxH,...",
        help=f"devices x hosts, e.g. 256x32 for 256 devices in 32 hosts (default: {_CLUSTERS})",
    )
    add("--epochs", type=float, metavar="N", help="windows of each recording (default: that of the configs)")
    add("--output", type=Path, metavar="DIR", help="writes capacity.json and capacity.md there too")
    options = parser.parse_args(argv)
    options.clusters = [_cluster(text) for text in options.clusters.split(",")]
    by_hand = {name: getattr(options, name) for name in ("windows_per_s", "parameters", "batch")}
    given = [name for name, value in by_hand.items() if value is not None]
    if options.measured is None and len(given) < len(by_hand):
        raise UserError(
            "give the efficiency.json of `ecg-jax efficiency`, or all of --windows-per-s, --parameters and --batch"
        )
    if options.measured is not None and given:
        raise UserError(
            f"--{given[0].replace('_', '-')} and {options.measured} both say how fast a device is; leave one out"
        )
    if options.epochs is not None and not _possible(options.epochs):
        raise UserError(
            f"--epochs={options.epochs:g} must be a positive number, from {1 / _MOST:g} to {_MOST:g}"
        )
    options.sources = read_sources(options.measured) if options.measured else _by_hand(**by_hand)
    return options


def _cluster(text: str) -> Cluster:
    match = _CLUSTER.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--clusters: {text!r} is not devices x hosts, e.g. 256x32")
    cluster = Cluster(int(match[1]), int(match[2]))
    if cluster.devices % cluster.hosts:
        raise UserError(f"--clusters: {cluster.devices} devices do not divide over {cluster.hosts} hosts")
    return cluster


def _possible(value: float) -> bool:
    return 1 / _MOST <= value <= _MOST


def _by_hand(windows_per_s: str, parameters: int, batch: int) -> list[Source]:
    try:
        rates = [float(part) for part in windows_per_s.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(map(_possible, rates)):
        raise UserError(
            f"--windows-per-s={windows_per_s} must be a positive number, from {1 / _MOST:g} to {_MOST:g}, or several "
            "with commas"
        )
    for name, value in (("parameters", parameters), ("batch", batch)):
        if not 1 <= value <= _MOST:
            raise UserError(f"--{name}={value} must be from 1 to {_MOST:g}")
    window_s = load_config("configs/cpc.py").data.window_s
    return [Source("as given", rate, batch, parameters, window_s) for rate in rates]


def read_sources(path: Path) -> list[Source]:
    """Every row of an efficiency.json that was measured.

    Raises:
        UserError: there is no such file, it is another, or nothing in it was measured.
    """
    try:
        found = json.loads(path.read_text())
        sources = [
            Source(
                model=f"{row['backbone']} {row['objective']} {row['precision']}",
                rate=float(row["programs"]["step"]["windows_per_s"]),
                batch=int(row["batch"]),
                parameters=int(row["parameters"]),
                window_s=float(found["window_s"]),
            )
            for row in found["rows"]
            if "failed" not in row
        ]
        if not all(_possible(number) for source in sources for number in source[1:]):
            raise ValueError("a number that cannot be")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what `ecg-jax efficiency` writes; give its efficiency.json"
        ) from error
    if not sources:
        raise UserError(f"{path} has no row that was measured; run `ecg-jax efficiency` again")
    return sources


def work_out(sources: Sequence[Source], clusters: Sequence[Cluster], epochs: float | None) -> dict[str, Any]:
    """What `capacity.json` holds: "loads", a row for each source and cluster, and "rungs", one for each rung too.

    Args:
        sources: models and their rates.
        clusters: devices and hosts.
        epochs: windows of each recording; None takes that of the configs.
    """
    config = load_config("configs/cpc.py")
    epochs = config.epochs if epochs is None else epochs
    rate_hz = config.data.rate_hz
    loads, rung_rows = [], []
    for source in sources:
        for cluster in clusters:
            who = {"model": source.model, "rate": source.rate, **cluster._asdict()}
            found = capacity.load(
                rate=source.rate,
                cluster=cluster,
                batch=source.batch,
                parameters=source.parameters,
                window_samples=round(source.window_s * rate_hz),
            )
            network = found.network_rate(0.1)
            loads.append(
                {**who, "batch": source.batch, **found._asdict(), "network_bytes_for_a_tenth": network}
            )
            rungs = capacity.rungs(
                SIZES,
                epochs=epochs,
                rate=source.rate,
                cluster=cluster,
                batch=source.batch,
                rate_hz=rate_hz,
            )
            rung_rows += [{**who, **rung._asdict()} for rung in rungs]
    return {"epochs": epochs, "rate_hz": rate_hz, "loads": loads, "rungs": rung_rows}


def main(argv: list[str]) -> int:
    """Entry point of `ecg-jax capacity`."""
    options = parse_arguments(argv)
    result = work_out(options.sources, options.clusters, options.epochs)
    tables = [
        (capacity.LOAD_HEAD, capacity.load_cells(result["loads"]), 1),
        (capacity.RUNG_HEAD, capacity.rung_cells(result["rungs"]), 1),
    ]
    for head, cells, text_columns in tables:
        print(f"{aligned(head, cells, text_columns)}\n")
    source = "" if options.measured is None else f"Rates: {options.measured}. "
    notes = f"{source}{result['epochs']:g} epochs. {capacity.NOTES}"
    print(notes)
    if options.output is not None:
        text = "\n\n".join(["# Capacity", *(markdown(*table) for table in tables), notes]) + "\n"
        try:
            options.output.mkdir(parents=True, exist_ok=True)
            write_atomic(options.output / "capacity.md", text.encode())
            numbers = json.dumps(result, indent=1, allow_nan=False) + "\n"
            write_atomic(options.output / "capacity.json", numbers.encode())
        except OSError as error:
            raise UserError(f"cannot write into --output={options.output}: {error.strerror}") from error
    return 0
