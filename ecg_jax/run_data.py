"""What a pretraining run reads: its stores, which of their recordings, and what it says of them afterwards."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ecg_jax.data import ladder
from ecg_jax.data.mixture import StoreSet, parse_weights
from ecg_jax.data.preprocessing import Preprocessing, parse_leads
from ecg_jax.data.selection import SELECTION_NAME, Selection, knows_selections, select_as_configured
from ecg_jax.data.store import Store
from ecg_jax.data.targets import Targets
from ecg_jax.errors import UserError
from ecg_jax.evaluation import online_probe
from ecg_jax.run_origin import find_origin
from ecg_jax.run_setup import flatten, open_store, open_targets
from ecg_jax.training.agreement import answers
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.workdir import stored_config

# Fields that may differ from process to process: where things lie, which are compared by their content, and how each
# process reads.
_LOCAL_FIELDS = {"store", "init.checkpoint", "data.selection", "data.read_threads", "data.prefetch"}


@dataclasses.dataclass(frozen=True)
class Watched:
    """What the online probe looks at.

    Attributes:
        chosen: labelled recordings, None where there can be none.
        store: that they are of.
        line: for people, which or why not.
    """

    chosen: online_probe.Slice | None
    store: Store
    line: str


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        store: all its stores.
        preprocessing: the contract, with the run's window, normalisation and kept leads.
        targets: offline targets, of objectives that predict them.
        selection: the recordings.
        shares: of each store in the crops; None: in proportion to its recordings.
        watched: of the online probe.
        origin: which checkpoint the run begins with, see `run_origin.describe_run`; None: none.
    """

    store: StoreSet
    preprocessing: Preprocessing
    targets: Targets | None
    selection: Selection
    shares: tuple[int, ...] | None
    watched: Watched
    origin: dict[str, Any] | None

    def provenance(self) -> dict[str, Any]:
        """What config.json and every checkpoint hold beside the config; JSON-able."""
        known: dict[str, Any] = {
            "store_fingerprint": self.store.fingerprint,
            "selection_fingerprint": self.selection.fingerprint,
        }
        if self.targets:
            known["targets_fingerprint"] = self.targets.fingerprint
        if self.origin:
            known["origin"] = self.origin
        return known

    def describe(self) -> list[str]:
        """For people, a sentence a line; warnings begin with "warning"."""
        selection, count = self.selection, len(self.store.stores)
        lines = [f"store{'s' if count > 1 else ''} {self.store}: {selection.describe()}"]
        for number, store in enumerate(self.store.stores if count > 1 else ()):
            train, val = selection.rows_of(number)
            share = (
                self.shares[number] / sum(self.shares) if self.shares else len(train) / len(selection.train)
            )
            line = f"  {store.path}: {len(train)} to train on, {len(val)} held out, {share:.1%} of the crops"
            if self.shares:
                times = share * len(selection.train) / len(train)
                line += f", each recording {times:.3g} times in an epoch of {len(selection.train)} crops"
            lines.append(line)
        kept = self.preprocessing.kept_leads
        if kept != self.preprocessing.leads:
            lines.append(
                f"sees {len(kept)} of {len(self.preprocessing.leads)} leads, {', '.join(kept)}; the others are zero"
            )
        if made_up := [str(store.path) for store in self.store.stores if store.synthetic]:
            lines.append(f"SYNTHETIC recordings in {', '.join(made_up)}: no encoder of ECGs comes of them")
        cut = selection.rule.max_records
        if cut is not None and selection.available < cut:
            # A number was chosen to compare with another run, a rung only bounds what there may be.
            lines.append(
                f"{'warning: ' if selection.rule.cut_by_number else ''}up to {cut} recordings were asked for; there "
                f"are {selection.available} to train on"
            )
        if selection.missing:
            lines.append(
                f"warning: {len(selection.missing)} of the {len(ladder.PARTITIONS[ladder.EVERYTHING])} partitions of "
                f"the paper are missing: {', '.join(selection.missing)}"
            )
        if self.origin:
            lines.append(f"begins with step {self.origin['step']} of {self.origin['run']}")
            if self.origin["window_samples"] != self.preprocessing.window_samples:
                lines.append(
                    f"its windows had {self.origin['window_samples']} samples, these have "
                    f"{self.preprocessing.window_samples}"
                )
            # A run begun before the field was declared saw all of them.
            before = parse_leads(({"leads": ""} | self.origin["data"])["leads"])
            if before != kept:
                lines.append(f"it saw the leads {', '.join(before)}")
        return lines


def open_data(config: ConfigDict, workdir: Path) -> RunData:
    """Opens the stores of a run and chooses its recordings, and sees to it that every process has the same.

    Args:
        config: of the run, checked.
        workdir: of the run. One begun before selections were files keeps the rule of its time.

    Raises:
        UserError: the stores, their recordings, the targets or the first checkpoint do not fit the config; or a process
            has another config, or other content where its paths lead. On every process.
        NoAnswer: a process did not answer in time.
    """
    mine, data = {"host": socket.gethostname()}, None
    try:
        data = _open(config, workdir)
        mine["reads"] = _reads(config, data)
    except UserError as error:
        mine["refused"] = str(error)
    _check_alike(answers("the data of the run", mine))
    return data


def _reads(config: ConfigDict, data: RunData) -> dict[str, tuple[Any, str]]:
    """What all processes must have alike, as (value, how to show it) by name.

    The number of steps follows from the config and the selection.
    """
    fields = {name: value for name, value in flatten(config.to_dict()).items() if name not in _LOCAL_FIELDS}
    targets, origin = data.targets, data.origin
    return {f"config.{name}": (value, repr(value)) for name, value in fields.items()} | {
        "store": (data.store.fingerprint, ", ".join(str(each.path.resolve()) for each in data.store.stores)),
        "selection": (data.selection.fingerprint, f"{len(data.selection.train)} recordings to train on"),
        "offline targets": (targets.fingerprint, str(targets.path)) if targets else (None, "none"),
        "first checkpoint": (origin, f"step {origin['step']} of {origin['run']}")
        if origin
        else (None, "none"),
    }


def _check_alike(heard: list[dict[str, Any]]) -> None:
    """Compares what processes said with what process 0 said.

    Raises:
        UserError: a process was refused its data, or reads another.
    """
    for process, said in enumerate(heard):
        if "refused" in said:
            raise UserError(f"process {process} on {said['host']}: " * (process > 0) + said["refused"])
    first = heard[0]
    for process, said in enumerate(heard):
        for name, (value, shown) in first["reads"].items():
            other, seen = said["reads"].get(name, (None, "none"))
            if other != value:
                raise UserError(
                    f"process {process} on {said['host']} has another {name} ({seen}) than process 0 on "
                    f"{first['host']} ({shown}); give every process the same command, and put what it reads where "
                    "every host sees the same"
                )


def _open(config: ConfigDict, workdir: Path) -> RunData:
    """`open_data` of this process alone."""
    store, preprocessing = open_store(config)
    targets = open_targets(config, store)
    fields, begun = config.data.to_dict(), bool(finished_steps(workdir))
    if begun and not knows_selections(before := stored_config(workdir)["data"]):
        fields = {name: fields[name] for name in before}
        fields["max_records"] = config.data.max_records or ladder.SIZES[config.data.rung]
    kept = workdir / SELECTION_NAME if begun else None
    selection = select_as_configured(store, fields, preprocessing.window_samples, kept)
    shares = parse_weights(config.data.weights)
    for number, each in enumerate(store.stores if shares else ()):
        if not len(selection.rows_of(number)[0]):
            raise UserError(
                f"config.data.weights={config.data.weights!r} gives the store {each.path} a share, but the selection "
                "holds none of its recordings to train on; leave the store out"
            )
    return RunData(
        store=store,
        preprocessing=preprocessing,
        targets=targets,
        selection=selection,
        shares=shares,
        watched=_watch(config, store, selection),
        origin=find_origin(config, workdir, preprocessing),
    )


def _watch(config: ConfigDict, stores: StoreSet, selection: Selection) -> Watched:
    """The slice of the first store that the online probe can look at.

    Raises:
        UserError: `config.monitor.task` fits none of the stores.
    """
    found, refusals = [], []
    for number, store in enumerate(stores.stores):
        try:
            chosen, line = online_probe.choose_slice(
                store,
                selection.rows_of(number)[0],
                task=config.monitor.task,
                every=config.monitor.probe_every,
                max_records=config.monitor.probe_records,
            )
        except UserError as error:
            refusals.append(error)
            continue
        if chosen is not None and len(stores.stores) > 1:
            line += f", of {store.path}"
        found.append(Watched(chosen, store, line))
        if chosen is not None:
            return found[-1]
    if not found:
        raise refusals[0]
    return found[0]
