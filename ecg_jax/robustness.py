"""`ecg-jax robustness`: how much of a linear probe survives missing leads, swapped cables, noise, other devices.

Nothing is fitted: the test recordings of the probe are corrupted, encoded and predicted again with its own head.
"""

import argparse
import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ecg_jax.config_flags import parse_command
from ecg_jax.data.preprocessing import MIN_RATE_HZ
from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, robustness_plot
from ecg_jax.evaluation.finished_probe import FinishedProbe, read_probe
from ecg_jax.evaluation.robustness import (
    CLEAN,
    UNITS,
    VERSION,
    Condition,
    Scorer,
    Unavailable,
    build_conditions,
    evaluate,
    predict,
)
from ecg_jax.files import lock, write_atomic
from ecg_jax.probe_output import plain
from ecg_jax.training.pretrained import pooled_fn

DESCRIPTION = """\
Corrupts the test recordings of a finished linear probe, condition by condition (fewer leads, swapped cables, noise
at stated signal-to-noise ratios, devices of lower rates, shorter recordings), predicts them with the probe as it is,
and scores each condition on the resamples of the clean score. Writes robustness.json, robustness.csv and
robustness.png. Run the same command again after an interruption: finished conditions are kept.
Leads: 1: I; 2: I, II; 3: I, II, V2; 6: the limb leads; 8: I, II, V1-V6; limb leads are derived where two are left.

  ecg-jax robustness probes/cpc_super
  ecg-jax robustness probes/cpc_super --config.conditions.snr_db="(12, 0)" --config.conditions.swaps="()"
"""
PARTS = "robustness_parts.json"
LOCK = ".robustness.lock"

# Largest difference between a clean prediction made now and the probe's own that another device or version of a
# library explains; another checkpoint or head differs by far more in some of the test records.
SAME_PREDICTION = 0.01


def check_config(config) -> None:
    """Refuses values that no suite can run with.

    Raises:
        UserError: names the field.
    """
    if config.seed < 0:
        raise UserError(f"--config.seed={config.seed} must be at least 0.")
    for name in ("batch_size", "threads"):
        if config[name] < 1:
            raise UserError(f"--config.{name}={config[name]} must be at least 1.")
    kinds = {"leads": int, "swaps": str, "noises": str}
    for name, values in config.conditions.items():
        kind = kinds[name] if name in kinds else int | float
        if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
            raise UserError(f"--config.conditions.{name}={values} holds a value of another type.")
        if kind is not str and not all(np.isfinite(value) for value in values):
            raise UserError(f"--config.conditions.{name}={values} must hold finite numbers.")
    if not all(rate >= MIN_RATE_HZ for rate in config.conditions.rates_hz):
        raise UserError(
            f"--config.conditions.rates_hz={config.conditions.rates_hz}: `ecg-jax prepare` takes no device of less "
            f"than {MIN_RATE_HZ} Hz."
        )
    if not all(seconds > 0 for seconds in config.conditions.durations_s):
        raise UserError(f"--config.conditions.durations_s={config.conditions.durations_s} must be above 0.")


def conditions_of(config, probe: FinishedProbe) -> tuple[list[Condition], list[Unavailable]]:
    """The suite of a config for the test records of a probe.

    Raises:
        UserError: a condition is unknown, named twice, or there is none.
    """
    contract, store = probe.encoder.preprocessing, probe.records.store
    lengths, rates = (store.column(name)[probe.records.rows] for name in ("length", "source_rate"))
    try:
        conditions, unavailable = build_conditions(
            **config.conditions.to_dict(),
            rate_hz=contract.rate_hz,
            source_hz=rates.max(),
            window_s=contract.window_s,
            longest_s=lengths.max() / contract.rate_hz,
            seed=config.seed,
        )
    except ValueError as error:
        raise UserError(f"--config.conditions: {error}") from error
    if not conditions:
        why = "".join(f"; {each.label}: {each.reason}" for each in unavailable[:3])
        raise UserError(f"--config.conditions leaves nothing to evaluate{why}")
    return conditions, unavailable


class _Parts:
    """Finished conditions of one probe and noise seed, kept in the output folder."""

    def __init__(self, output: Path, identity: dict):
        self.path, self.identity = output / PARTS, identity
        self.finished: dict[str, dict] = {}
        if not self.path.exists():
            if (output / "robustness.json").exists():
                raise UserError(f"{output} holds a robustness.json of another run; choose another --output")
            return
        try:
            before = json.loads(self.path.read_text())
            kept = before["identity"]
            differing = [key for key, value in identity.items() if key not in kept or kept[key] != value]
            self.finished = dict(before["finished"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged; remove it, or choose another --output") from error
        if differing:
            raise UserError(
                f"{output} holds the robustness of another probe, seed or version (other {', '.join(differing)}); "
                "choose another --output"
            )

    def add(self, key: str, entry: dict) -> None:
        """Keeps a condition, safe against an interruption."""
        self.finished[key] = entry
        write_atomic(self.path, _json({"identity": self.identity, "finished": self.finished}))


def _key(condition: Condition) -> str:
    return f"{condition.family}/{condition.label}"


def _json(value) -> bytes:
    return (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode()


def robustness(
    config,
    workdir: str | Path,
    output: str | Path | None = None,
    checkpoint: str | None = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Runs the suite on a finished linear probe and writes robustness.json, .csv and .png.

    Args:
        config: from configs/robustness.py.
        workdir: of the probe.
        output: folder of the results; None for the folder `robustness` in `workdir`.
        checkpoint, store: see `read_probe`.
        progress: bars on the terminal.

    Returns:
        What robustness.json holds.

    Raises:
        UserError: anything in the config, the probe or the folders that does not fit.
    """
    check_config(config)
    workdir = Path(workdir)
    output = workdir / "robustness" if output is None else Path(output)
    probe = read_probe(workdir, checkpoint, store)
    conditions, unavailable = conditions_of(config, probe)
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = (output / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"cannot write into --output={output}: {error.strerror}; name another folder"
        ) from error
    with held:
        lock(
            held,
            f"another `ecg-jax robustness` is running in {output}; wait for it, or choose another --output",
        )
        parts = _Parts(output, _identity(config, probe))
        _complete(config, probe, workdir, conditions, parts, progress)
        results = _results(config, workdir, probe, conditions, unavailable, parts)
        robustness_plot.robustness_curves(results, output / "robustness.png")
        write_atomic(output / "robustness.csv", csv_of(results).encode())
        # Last: a folder with robustness.json is complete.
        write_atomic(output / "robustness.json", _json(results))
    return results


def _identity(config, probe: FinishedProbe) -> dict:
    """What makes two suites the same, whatever their conditions and wherever the folders are now."""
    digest = hashlib.sha256("\0".join(probe.records.record_ids).encode())
    for array in (probe.predictions, probe.targets):
        digest.update(np.ascontiguousarray(array, np.float64).tobytes())
    return plain(
        {
            "checkpoint": probe.results["checkpoint"],
            "store": probe.records.store.fingerprint,
            "predictions": digest.hexdigest(),
            "bootstrap": probe.results["bootstrap"],
            "probe_seed": probe.results["seed"],
            "seed": config.seed,
            "corruptions": VERSION,
        }
    )


def _scorer(probe: FinishedProbe) -> Scorer:
    """On the resamples of the probe's own results."""
    settings = probe.results["bootstrap"]
    codes, _ = bootstrap.units(probe.patient_ids, len(probe.targets))
    return Scorer(
        probe.results["metric"],
        probe.targets,
        bootstrap.draw(codes, settings["resamples"], probe.results["seed"]),
        settings["undefined"],
        settings["level"],
        settings["interval"],
        bootstrap.leave_one_out(codes) if settings["interval"] == "bca" else None,
    )


def _predictor(config, probe: FinishedProbe, progress: bool) -> Callable[[Condition], np.ndarray]:
    """Condition -> predictions [n, K], with one compiled encoder for all of them."""
    pooled = pooled_fn(probe.encoder, tuple(probe.head.weights))

    def predict_condition(condition: Condition) -> np.ndarray:
        try:
            return predict(
                pooled,
                probe.head.predict,
                probe.records,
                condition,
                window=probe.encoder.preprocessing.window_samples,
                batch_size=config.batch_size,
                threads=config.threads,
                progress=_key(condition) if progress else None,
            )
        except ValueError as error:
            raise UserError(f"checkpoint {probe.encoder.run}, {_key(condition)}: {error}") from error

    return predict_condition


def _complete(
    config,
    probe: FinishedProbe,
    workdir: Path,
    conditions: Sequence[Condition],
    parts: _Parts,
    progress: bool,
) -> None:
    """Evaluates what is not finished yet.

    Raises:
        UserError: the clean records are no longer predicted as the probe predicted them.
    """
    waiting = [condition for condition in conditions if _key(condition) not in parts.finished]
    if not waiting:
        return
    predict_condition = _predictor(config, probe, progress)
    largest = float(np.abs(predict_condition(CLEAN) - probe.predictions).max())
    if not largest <= SAME_PREDICTION:
        raise UserError(
            f"the probe's checkpoint or head has changed: a clean test record is now predicted {largest:.2g} off what "
            f"{workdir / 'predictions.npz'} says (at most {SAME_PREDICTION} is rounding); run the probe again"
        )
    for condition, entry in evaluate(predict_condition, _scorer(probe), probe.predictions, waiting):
        parts.add(_key(condition), entry)


def _results(
    config,
    workdir: Path,
    probe: FinishedProbe,
    conditions: Sequence[Condition],
    unavailable: Sequence[Unavailable],
    parts: _Parts,
) -> dict:
    scorer = _scorer(probe)
    families: dict[str, list] = {}
    for condition in conditions:
        families.setdefault(condition.family, []).append(parts.finished[_key(condition)])
    names = ("model", "mode", "checkpoint")
    return plain(
        {
            "probe": {
                "workdir": str(workdir.resolve()),
                **{name: probe.results[name] for name in names},
                "store": str(probe.records.store.path.resolve()),
            },
            "task": probe.results["task"],
            "metric": probe.results["metric"],
            "n_records": len(probe.targets),
            "clean": scorer.interval(scorer.score(probe.predictions))._asdict(),
            "families": [
                {"family": family, "unit": UNITS[family], "conditions": entries}
                for family, entries in families.items()
            ],
            "unavailable": [each._asdict() for each in unavailable],
            "bootstrap": probe.results["bootstrap"],
            "noise_seed": config.seed,
        }
    )


_COLUMNS = ("family", "unit", "label", "value", "point", "low", "high")


def csv_of(results: dict) -> str:
    """One line for the clean records and one for each condition; empty where a number is undefined."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow((*_COLUMNS, "difference", "difference_low", "difference_high", "note"))
    writer.writerow(["clean", None, "clean", None, *results["clean"].values(), None, None, None, ""])
    for family in results["families"]:
        for entry in family["conditions"]:
            row = family | entry
            writer.writerow([*(row[name] for name in _COLUMNS), *entry["difference"].values(), entry["note"]])
    return buffer.getvalue()


def summary(results: dict) -> str:
    """The table for the console."""

    def numbers(entry: dict, sign: str = "") -> str:
        point, low, high = (
            float("nan") if entry[name] is None else entry[name] for name in ("point", "low", "high")
        )
        return f"{point:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    boot, metric = results["bootstrap"], results["metric"].replace("_auroc", " AUROC")
    lines = [
        f"{results['task']}, {results['probe']['model']}: {results['n_records']} test records",
        f"  {'':<30}{metric + ', ' + format(100 * boot['level'], 'g') + ' % interval':<28}difference to clean",
        f"  {'clean':<30}{numbers(results['clean'])}",
    ]
    for family in results["families"]:
        lines.append(f"  {family['family'].replace('_', ' ')}")
        # Which leads a number of them means, --help says.
        notes = (
            {}
            if family["family"] == "leads"
            else {e["note"]: None for e in family["conditions"] if e["note"]}
        )
        for entry in family["conditions"]:
            mark = " *" if entry["note"] in notes else ""
            lines.append(
                f"    {entry['label'] + mark:<28}{numbers(entry):<28}{numbers(entry['difference'], '+')}"
            )
        lines += [f"      * {note}" for note in notes]
    for each in results["unavailable"]:
        lines.append(f"  not evaluated: {each['family'].replace('_', ' ')} {each['label']}: {each['reason']}")
    return "\n".join(lines)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("probe", metavar="PROBE_WORKDIR", help="workdir of a finished linear `ecg-jax probe`")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the results (default: PROBE_WORKDIR/robustness)"
    )
    parser.add_argument(
        "--checkpoint", metavar="RUN[/STEP]", help="where the probe's checkpoint is now, if it moved"
    )
    parser.add_argument("--store", help="where the store that was tested on is now, if it moved")


def main(argv: list[str]) -> int:
    """`ecg-jax robustness`."""
    config, options = parse_command(
        "robustness",
        DESCRIPTION,
        argv,
        _add_options,
        like="configs/robustness.py",
        default_config="configs/robustness.py",
    )
    results = robustness(config, options.probe, options.output, options.checkpoint, options.store)
    print(summary(results))
    print(f"  written to {options.output or Path(options.probe) / 'robustness'}")
    return 0
