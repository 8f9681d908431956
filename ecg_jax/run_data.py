"""What a pretraining run reads: its stores, which of their recordings, and what it says of them afterwards."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ecg_jax.data import ladder
from ecg_jax.data.mixture import StoreSet, parse_weights
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.selection import Selection, knows_selections, select_as_configured
from ecg_jax.data.store import Store
from ecg_jax.data.targets import Targets
from ecg_jax.errors import UserError
from ecg_jax.evaluation import online_probe
from ecg_jax.run_origin import find_origin
from ecg_jax.run_setup import open_store, open_targets
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.workdir import stored_config


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
        preprocessing: the contract, with the run's window and normalisation.
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
            lines.append(
                f"  {store.path}: {len(train)} to train on, {len(val)} held out, {share:.1%} of the crops"
            )
        if made_up := [str(store.path) for store in self.store.stores if store.synthetic]:
            lines.append(f"SYNTHETIC recordings in {', '.join(made_up)}: no encoder of ECGs comes of them")
        cut = selection.rule.max_records
        if cut is not None and selection.available < cut:
            lines.append(
                f"up to {cut} recordings were asked for; there are {selection.available} to train on"
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
        return lines


def open_data(config: ConfigDict, workdir: Path) -> RunData:
    """Opens the stores of a run and chooses its recordings.

    Args:
        config: of the run, checked.
        workdir: of the run. One begun before selections were files keeps the rule of its time.

    Raises:
        UserError: the stores, their recordings, the targets or the first checkpoint do not fit the config.
    """
    store, preprocessing = open_store(config)
    targets = open_targets(config, store)
    fields = config.data.to_dict()
    if finished_steps(workdir) and not knows_selections(before := stored_config(workdir)["data"]):
        fields = {name: fields[name] for name in before}
        fields["max_records"] = config.data.max_records or ladder.SIZES[config.data.rung]
    selection = select_as_configured(store, fields, preprocessing.window_samples)
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
