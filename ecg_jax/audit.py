"""`ecg-jax audit`: recordings and patients that are on both sides of a split, or in two stores."""

import argparse
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation import near_duplicates, tasks
from ecg_jax.evaluation.audited import Audited, open_stores, split_stores
from ecg_jax.evaluation.leakage import identical_pairs, shared_patients
from ecg_jax.evaluation.near_duplicates import Match, near_identical, too_many
from ecg_jax.evaluation.signatures import Signatures, signatures
from ecg_jax.files import write_atomic

DESCRIPTION = """\
Looks for leaks: identical recordings (equal samples), near-identical ones (the same recording with another gain,
offset, filter, rate, shift or crop), and patients, across the parts of each store and between stores.

The parts are made of the store's own folds: the highest is test, the one below validation, the others training.
Tasks that stratify their folds test on other recordings; --task=NAME audits the split that a probe of that task uses
instead, in every store of its corpus. A test recording that is anywhere in another store counts too, because that
store may be what an encoder was pretrained on.

  ecg-jax audit stores/ptbxl
  ecg-jax audit stores/sph --task=sph
  ecg-jax audit stores/ptbxl stores/challenge2021 --output=audits/ptbxl_in_challenge
"""
EPILOG = f"""\
Near-identical means: {near_duplicates.MIN_OVERLAP_S:g} s or more in common, and over them a correlation of \
{near_duplicates.MIN_CORRELATION:g} or more of the signals
and of {near_duplicates.MIN_RESIDUAL_CORRELATION:g} or more of what the average beat leaves (medians over leads, \
{near_duplicates.COMPARED_BAND_HZ[0]:g}-{near_duplicates.COMPARED_BAND_HZ[1]:g} Hz).
In stores of more than {near_duplicates.MAX_RECORDINGS:,} recordings only identical ones are looked for.
Patients are compared within one corpus only. The exit code is 0 whatever is found, unless --fail-on-leak.
"""
SHOWN = 20
#: Shortest recording that a probe uses, as in `ecg-jax tasks`.
WINDOW_S = 2.5


def audit(
    paths: list[Path],
    near: bool = True,
    cache: Path | None = None,
    task: str | None = None,
    window_s: float = WINDOW_S,
) -> dict:
    """Compares everything with everything.

    Args:
      paths: of one or more stores.
      near: look for near-identical recordings too, where there are no more than `near_duplicates.MAX_RECORDINGS`.
      cache: folder that keeps signatures of stores for the next audit; None keeps none.
      task: whose split is audited in the stores of its corpus; None audits the folds of the stores.
      window_s: seconds; shorter recordings take no part in a task.

    Returns:
      What audit.json holds, see `ecg-jax audit --help` and the README.

    Raises:
      UserError: see `open_stores` and `split_stores`; a damaged store.
    """
    stores = split_stores(open_stores(paths), task, window_s)
    described: dict[str, Signatures] = {}
    if near:
        for name, audited in stores.items():
            if too_many(len(audited.rows)) is None:
                described[name] = signatures(audited.store, audited.rows, cache)
    identical, similar = [], []
    found: dict[tuple[str, str], tuple[list, list | None]] = {}
    for (name_a, a), (name_b, b) in itertools.combinations_with_replacement(stores.items(), 2):
        same, close = identical_pairs(a.store, a.rows, b.store, b.rows), None
        if name_a in described and name_b in described:
            matches = near_identical(described[name_a], described[name_b])
            close = [(match.row_a, match.row_b) for match in matches]
            similar += [
                pair | _measured(match)
                for pair, match in zip(_described((name_a, name_b), (a, b), close), matches, strict=True)
            ]
        found[name_a, name_b] = same, close
        identical += _described((name_a, name_b), (a, b), same)
    overlap = _overlaps(stores, found)
    leaks = _leaks(overlap)
    # Of stores that are all too large nothing is known, as where it was not wanted.
    pairs = {"identical": identical, "near_identical": similar if described else None}
    across = {
        kind: None if found is None else sum(len(set(p["stores"])) == 1 < len(set(p["folds"])) for p in found)
        for kind, found in pairs.items()
    }
    patients = _patients_across_folds(stores)
    everywhere = len(described) == len(stores)
    text = "Leak: " + "; ".join(leaks) + "." if leaks else _clean(stores, everywhere)
    if (copies := sum(filter(None, across.values()))) or patients:
        text += f" Across folds of any part: {copies} pairs of copies and {len(patients)} patients."
    summaries = [_summary(name, audited, described.get(name)) for name, audited in stores.items()]
    return {
        "stores": summaries,
        **pairs,
        "copies_across_folds": across,
        "patients_across_folds": patients,
        "train_test_overlap": overlap,
        "examined": {"identical": True, "near_identical": everywhere},
        "verdict": " ".join([text, *_not_examined(stores, described, near, summaries)]),
        "clean": not leaks,
    }


def _not_examined(
    stores: dict[str, Audited], described: dict[str, Signatures], near: bool, summaries: list[dict]
) -> list[str]:
    """What the audit says nothing about, in sentences."""
    sentences = []
    if not near:
        sentences.append("Near-identical recordings were not looked for.")
    else:
        sentences += [
            f"Near-identical recordings of {name} were not looked for: {too_many(len(audited.rows))}."
            for name, audited in stores.items()
            if name not in described
        ]
    for summary in summaries:
        if summary["split_otherwise_by"]:
            sentences.append(
                f"The parts of {summary['name']} are its own folds; tasks that split it otherwise were not "
                f"examined ({', '.join(f'--task={name}' for name in summary['split_otherwise_by'])})."
            )
    return sentences


def _summary(name: str, audited: Audited, described: Signatures | None) -> dict:
    store = audited.store
    folds = Counter(store.column("fold").tolist())
    patients = [patient for patient in store.column("patient_id")[audited.rows] if patient]
    others = tasks.fitting(store.corpus, list(store.classes), list(store.values))
    by_folds = audited.split == Audited.BY_FOLDS
    return {
        "name": name,
        "path": str(store.path),
        "corpus": store.corpus,
        "fingerprint": store.fingerprint,
        "rate_hz": store.rate_hz,
        "records": len(audited.rows),
        "records_in_store": len(store),
        "patients": len(set(patients)),
        "records_without_patient": len(audited.rows) - len(patients),
        "folds": {str(fold): folds[fold] for fold in sorted(folds)},
        "split": audited.split,
        "split_otherwise_by": [t.name for t in others if by_folds and t.split == "stratified"],
        "parts": {part: len(rows) for part, rows in audited.parts.items()},
        "compared_by_checksum_only": len(audited.rows) if described is None else len(described.without),
    }


def _described(
    names: tuple[str, str], audited: tuple[Audited, Audited], pairs: list[tuple[int, int]]
) -> list[dict]:
    """Pairs of recordings in words."""
    stores = [each.store for each in audited]
    ids, patients = ([store.column(name) for store in stores] for name in ("record_id", "patient_id"))
    described = []
    for p, q in pairs:
        known = stores[0].corpus == stores[1].corpus and patients[0][p] and patients[1][q]
        described.append(
            {
                "stores": list(names),
                "records": [str(ids[0][p]), str(ids[1][q])],
                "folds": [audited[0].place[p], audited[1].place[q]],
                "same_patient": bool(patients[0][p] == patients[1][q]) if known else None,
            }
        )
    return described


def _measured(match: Match) -> dict:
    """How alike two recordings are, as JSON has it."""
    residual = match.residual_correlation
    return {
        "shift_s": round(match.shift_s, 3),
        "overlap_s": round(match.overlap_s, 3),
        "correlation": round(match.correlation, 4),
        "residual_correlation": None if np.isnan(residual) else round(residual, 4),
    }


def _patients_across_folds(stores: dict[str, Audited]) -> list[dict]:
    """Patients with recordings in several folds of the stores of one corpus, of a task's split in several parts."""
    where: dict[tuple[str, str], dict[str, set]] = {}
    for name, audited in stores.items():
        patients = audited.store.column("patient_id")
        for row, place in audited.place.items():
            if patients[row]:
                key = audited.store.corpus, patients[row]
                where.setdefault(key, {}).setdefault(name, set()).add(place)
    return [
        {"corpus": corpus, "patient": patient, "folds": {name: sorted(folds) for name, folds in held.items()}}
        for (corpus, patient), held in sorted(where.items())
        if len(set().union(*held.values())) > 1
    ]


def _overlaps(stores: dict[str, Audited], found: dict) -> dict:
    """ "A test" -> "B train" -> how many recordings of the first, and patients, are in the second."""
    split = {name: audited.parts for name, audited in stores.items()}
    part_of = {
        name: {row: part for part, rows in split[name].items() for row in rows.tolist()} for name in stores
    }
    counts: dict[tuple[str, str, str, str], tuple[set, set]] = defaultdict(lambda: (set(), set()))
    for (name_a, name_b), kinds in found.items():
        for kind, pairs in enumerate(kinds):
            for p, q in pairs or []:
                for one, x, two, y in ((name_a, p, name_b, q), (name_b, q, name_a, p)):
                    key = one, part_of[one][x], two, part_of[two][y]
                    counts[key][kind].add(x)
    table: dict[str, dict] = {}
    for name_a, part_a in ((name, part) for name in stores for part in split[name] if part != "train"):
        row = table[f"{name_a} {part_a}"] = {}
        for name_b, part_b in ((name, part) for name in stores for part in split[name]):
            if name_a == name_b and (part_b == part_a or part_b == "test"):
                continue
            key = name_a, part_a, name_b, part_b
            same, similar = counts[key]
            patients = shared_patients(
                stores[name_a].store, split[name_a][part_a], stores[name_b].store, split[name_b][part_b]
            )
            near = found.get((name_a, name_b), found.get((name_b, name_a)))[1] is not None
            row[f"{name_b} {part_b}"] = {
                "identical": len(same),
                "near_identical": len(similar - same) if near else None,
                "patients": None if patients is None else len(patients),
            }
    return table


def _leaks(overlap: dict) -> list[str]:
    """Cells of the table that are not zero, in words."""
    words = {"identical": "identical", "near_identical": "near-identical", "patients": "patients"}
    leaks = []
    for of, places in overlap.items():
        for where, cell in places.items():
            numbers = [f"{cell[key]} {word}" for key, word in words.items() if cell[key]]
            if numbers:
                leaks.append(f"{of} in {where}: {', '.join(numbers)}")
    return leaks


def _clean(stores: dict[str, Audited], near: bool) -> str:
    kinds = "identical or near-identical" if near else "identical"
    what = "another part or store" if len(stores) > 1 else "another part"
    return f"Clean: no test or validation recording is in {what} ({kinds}), and no patient is in two parts."


def render(result: dict) -> str:
    """The audit for people."""
    lines = []
    for store in result["stores"]:
        split = ", ".join(f"{part} {n}" for part, n in store["parts"].items())
        of = "" if store["records"] == store["records_in_store"] else f" of {store['records_in_store']}"
        lines.append(f"{store['name']}: {store['records']}{of} records of {store['corpus']} ({split})")
        lines.append(f"  parts: {store['split']}")
        if store["records_without_patient"]:
            lines.append(f"  {store['records_without_patient']} records without a patient id")
        if store["compared_by_checksum_only"]:
            lines.append(f"  {store['compared_by_checksum_only']} records compared by checksum only")
    for key, title in (
        ("identical", "Identical recordings"),
        ("near_identical", "Near-identical recordings"),
    ):
        pairs = result[key]
        lines += ["", f"{title}: " + ("not looked for" if pairs is None else str(len(pairs)))]
        # Pairs across folds or stores matter most.
        ranked = sorted(pairs or [], key=lambda pair: pair["stores"][0] == pair["stores"][1])
        ranked.sort(key=lambda pair: len(set(pair["folds"])) == 1)
        for pair in ranked[:SHOWN]:
            ends = [
                f"{name} {record} ({f'fold {fold}' if isinstance(fold, int) else fold})"
                for name, record, fold in zip(pair["stores"], pair["records"], pair["folds"], strict=True)
            ]
            patient = {True: ", same patient", False: ", other patient", None: ""}[pair["same_patient"]]
            numbers = (
                f", shift {pair['shift_s']:g} s, r {pair['correlation']:.3f}" if "shift_s" in pair else ""
            )
            lines.append(f"  {ends[0]} = {ends[1]}{patient}{numbers}")
        if len(ranked) > SHOWN:
            lines.append(f"  and {len(ranked) - SHOWN} more in audit.json (--output)")
    lines += ["", f"Patients in several folds of one corpus: {len(result['patients_across_folds'])}", ""]
    lines.append(f"{'records of':<28}{'found in':<28}{'identical':>10}{'near':>8}{'patients':>10}")
    for of, places in result["train_test_overlap"].items():
        for where, cell in places.items():
            numbers = ["-" if cell[key] is None else str(cell[key]) for key in cell]
            lines.append(f"{of:<28}{where:<28}{numbers[0]:>10}{numbers[1]:>8}{numbers[2]:>10}")
    return "\n".join([*lines, "", result["verdict"]])


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax audit",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stores", nargs="*", metavar="STORE", type=Path, help="stores of `ecg-jax prepare`")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for audit.json and signatures")
    parser.add_argument("--task", metavar="NAME", help="audit the split of this task, see `ecg-jax tasks`")
    parser.add_argument(
        "--window",
        type=float,
        default=WINDOW_S,
        metavar="S",
        help=f"with --task: shortest recording that is used (default: {WINDOW_S:g} s)",
    )
    parser.add_argument("--identical-only", action="store_true", help="leave out near-identical ones (fast)")
    parser.add_argument("--fail-on-leak", action="store_true", help="exit with 1 if anything leaks")
    options = parser.parse_args(argv)
    if not 0 < options.window < float("inf"):
        raise UserError(f"--window={options.window:g} must be a number of seconds above 0.")
    cache = None
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output={options.output} cannot be made: {error.strerror}") from error
        cache = options.output / "signatures"
    result = audit(options.stores, not options.identical_only, cache, options.task, options.window)
    if options.output is not None:
        write_atomic(options.output / "audit.json", (json.dumps(result, indent=1) + "\n").encode())
    print(render(result))
    return 1 if options.fail_on_leak and not result["clean"] else 0
