"""`ecg-jax audit`: recordings and patients that are on both sides of a split, or in two stores."""

import argparse
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import near_duplicates
from ecg_jax.evaluation.leakage import identical_pairs, shared_patients
from ecg_jax.evaluation.near_duplicates import Match, near_identical
from ecg_jax.files import write_atomic

DESCRIPTION = """\
Looks for leaks: identical recordings (equal samples), near-identical ones (the same recording with another gain,
offset, filter, rate, shift or crop), and patients, across the folds of each store and between stores. The parts are
those that probes use: the highest fold is test, the one below validation, the others training. A test recording that
is anywhere in another store counts too, because that store may be what an encoder was pretrained on.

  ecg-jax audit stores/ptbxl
  ecg-jax audit stores/ptbxl stores/challenge2021 --output=audits/ptbxl_in_challenge
"""
EPILOG = f"""\
Near-identical means: {near_duplicates.MIN_OVERLAP_S:g} s or more in common, and over them a correlation of \
{near_duplicates.MIN_CORRELATION:g} or more of the signals
and of {near_duplicates.MIN_RESIDUAL_CORRELATION:g} or more of what the average beat leaves (medians over leads, \
{near_duplicates.COMPARED_BAND_HZ[0]:g}-{near_duplicates.COMPARED_BAND_HZ[1]:g} Hz).
Patients are compared within one corpus only. The exit code is 0 whatever is found, unless --fail-on-leak.
"""
SHOWN = 20


def parts(store: Store) -> dict[str, np.ndarray]:
    """Rows of "train", "val" and "test": the highest fold is test, the one below validation.

    A store of two folds has no validation part, a store of one only "train".
    """
    folds = store.column("fold")
    known = np.unique(folds)
    if len(known) == 1:
        return {"train": np.arange(len(store))}
    if len(known) == 2:
        return {"train": np.flatnonzero(folds == known[0]), "test": np.flatnonzero(folds == known[1])}
    return {
        "train": np.flatnonzero(folds < known[-2]),
        "val": np.flatnonzero(folds == known[-2]),
        "test": np.flatnonzero(folds == known[-1]),
    }


def open_stores(paths: list[Path]) -> dict[str, Store]:
    """Name -> store; the folder's name where that is enough to tell them apart, else the path.

    Raises:
      UserError: no store, the same one twice, or stores of different rates.
    """
    if not paths:
        raise UserError("There is no store to audit; name one or more, as in `ecg-jax audit stores/ptbxl`.")
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"The store {path} is given twice (as {seen[path.resolve()]}); name it once.")
        seen[path.resolve()] = path
    stores = [Store(path) for path in paths]
    for store in stores[1:]:
        if store.rate_hz != stores[0].rate_hz:
            raise UserError(
                f"The stores {stores[0].path} and {store.path} have {stores[0].rate_hz:g} and {store.rate_hz:g} "
                "samples per second; only stores of one rate can be compared, so prepare them at one."
            )
    names = Counter(path.resolve().name for path in paths)
    return {
        path.resolve().name if names[path.resolve().name] == 1 else str(path): store
        for path, store in zip(paths, stores, strict=True)
    }


def audit(paths: list[Path], near: bool = True, cache: Path | None = None) -> dict:
    """Compares everything with everything.

    Args:
      paths: of one or more stores.
      near: look for near-identical recordings too.
      cache: folder that keeps signatures of stores for the next audit; None keeps none.

    Returns:
      What audit.json holds, see `ecg-jax audit --help` and the README.

    Raises:
      UserError: see `open_stores`; a damaged store.
    """
    stores = open_stores(paths)
    identical, similar = [], []
    found: dict[tuple[str, str], tuple[list, list]] = {}
    for (name_a, a), (name_b, b) in itertools.combinations_with_replacement(stores.items(), 2):
        rows = np.arange(len(a)), np.arange(len(b))
        same = identical_pairs(a, rows[0], b, rows[1])
        matches = near_identical(a, rows[0], b, rows[1], cache) if near else []
        close = [(match.row_a, match.row_b) for match in matches]
        found[name_a, name_b] = same, close
        identical += _described((name_a, name_b), (a, b), same)
        similar += [
            pair | _measured(match)
            for pair, match in zip(_described((name_a, name_b), (a, b), close), matches, strict=True)
        ]
    overlap = _overlaps(stores, found, near)
    leaks = _leaks(overlap)
    pairs = {"identical": identical, "near_identical": similar if near else None}
    across = {
        kind: None if found is None else sum(len(set(p["stores"])) == 1 < len(set(p["folds"])) for p in found)
        for kind, found in pairs.items()
    }
    patients = _patients_across_folds(stores)
    text = "Leak: " + "; ".join(leaks) + "." if leaks else _clean(stores, near)
    if (copies := sum(filter(None, across.values()))) or patients:
        text += f" Across folds of any part: {copies} pairs of copies and {len(patients)} patients."
    return {
        "stores": [_summary(name, store, near, cache) for name, store in stores.items()],
        **pairs,
        "copies_across_folds": across,
        "patients_across_folds": patients,
        "train_test_overlap": overlap,
        "verdict": text,
        "clean": not leaks,
    }


def _summary(name: str, store: Store, near: bool, cache: Path | None) -> dict:
    folds = Counter(store.column("fold").tolist())
    patients = [patient for patient in store.column("patient_id") if patient]
    return {
        "name": name,
        "path": str(store.path),
        "corpus": store.corpus,
        "fingerprint": store.fingerprint,
        "rate_hz": store.rate_hz,
        "records": len(store),
        "patients": len(set(patients)),
        "records_without_patient": len(store) - len(patients),
        "folds": {str(fold): folds[fold] for fold in sorted(folds)},
        "parts": {part: len(rows) for part, rows in parts(store).items()},
        "compared_by_checksum_only": len(near_duplicates.signatures(store, cache=cache).without)
        if near
        else len(store),
    }


def _described(
    names: tuple[str, str], stores: tuple[Store, Store], pairs: list[tuple[int, int]]
) -> list[dict]:
    """Pairs of recordings in words."""
    ids, patients, folds = ([s.column(c) for s in stores] for c in ("record_id", "patient_id", "fold"))
    described = []
    for p, q in pairs:
        known = stores[0].corpus == stores[1].corpus and patients[0][p] and patients[1][q]
        described.append(
            {
                "stores": list(names),
                "records": [str(ids[0][p]), str(ids[1][q])],
                "folds": [int(folds[0][p]), int(folds[1][q])],
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


def _patients_across_folds(stores: dict[str, Store]) -> list[dict]:
    """Patients with recordings in several folds of the stores of one corpus."""
    where: dict[tuple[str, str], dict[str, set[int]]] = {}
    for name, store in stores.items():
        for patient, fold in zip(store.column("patient_id"), store.column("fold").tolist(), strict=True):
            if patient:
                where.setdefault((store.corpus, patient), {}).setdefault(name, set()).add(fold)
    return [
        {"corpus": corpus, "patient": patient, "folds": {name: sorted(folds) for name, folds in held.items()}}
        for (corpus, patient), held in sorted(where.items())
        if len(set().union(*held.values())) > 1
    ]


def _overlaps(stores: dict[str, Store], found: dict, near: bool) -> dict:
    """ "A test" -> "B train" -> how many recordings of the first, and patients, are in the second."""
    split = {name: parts(store) for name, store in stores.items()}
    part_of = {
        name: {row: part for part, rows in split[name].items() for row in rows.tolist()} for name in stores
    }
    counts: dict[tuple[str, str, str, str], tuple[set, set]] = defaultdict(lambda: (set(), set()))
    for (name_a, name_b), kinds in found.items():
        for kind, pairs in enumerate(kinds):
            for p, q in pairs:
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
                stores[name_a], split[name_a][part_a], stores[name_b], split[name_b][part_b]
            )
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


def _clean(stores: dict[str, Store], near: bool) -> str:
    kinds = "identical or near-identical" if near else "identical"
    what = "another part or store" if len(stores) > 1 else "another part"
    text = f"Clean: no test or validation recording is in {what} ({kinds}), and no patient is in two parts."
    return text if near else f"{text} Near-identical recordings were not looked for."


def render(result: dict) -> str:
    """The audit for people."""
    lines = []
    for store in result["stores"]:
        split = ", ".join(f"{part} {n}" for part, n in store["parts"].items())
        lines.append(f"{store['name']}: {store['records']} records of {store['corpus']} ({split})")
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
                f"{name} {record} (fold {fold})"
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
    parser.add_argument("--identical-only", action="store_true", help="leave out near-identical ones (fast)")
    parser.add_argument("--fail-on-leak", action="store_true", help="exit with 1 if anything leaks")
    options = parser.parse_args(argv)
    cache = None
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output={options.output} cannot be made: {error.strerror}") from error
        cache = options.output / "signatures"
    result = audit(options.stores, near=not options.identical_only, cache=cache)
    if options.output is not None:
        write_atomic(options.output / "audit.json", (json.dumps(result, indent=1) + "\n").encode())
    print(render(result))
    return 1 if options.fail_on_leak and not result["clean"] else 0
