"""The table and the console summary of a label-efficiency study."""

import csv
import io
from typing import Any


def table(results: dict[str, Any]) -> str:
    """CSV: one line for each model, size and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "model", "fraction", "records", "seed", results["metric"], "l2", "layer"])
    for name, model in results["models"].items():
        for s, of_size in enumerate(model["scores"]):
            for i, value in enumerate(of_size):
                probe = model["probes"][s][i] if "probes" in model else {"l2": None, "layers": None}
                l2 = "" if probe["l2"] is None else probe["l2"]
                layer = probe["layers"]["chosen"] if probe["layers"] else ""
                records = results["sizes_of_seeds"][s][i]
                fraction = results["fractions"][s]
                writer.writerow([results["task"], name, fraction, records, i, value, l2, layer])
    return text.getvalue()


def _number(value: float | None, digits: str) -> str:
    return "undefined" if value is None else format(value, digits)


def _share(entry: dict[str, Any], name: str) -> str:
    """A factor or an end of its interval; an open one as "< x" or "> x"."""
    side = entry[f"{name}_open"]
    if side is None:
        return _number(entry[name], ".2g")
    return f"{side} {entry['least' if side == '<' else 'most']:.2g}"


def saving_in_words(better: str, other: str, entry: dict[str, Any]) -> str:
    """One line about a pair of models: at the largest size whose factor is known, else at the largest."""
    if "undefined" in entry:
        return f"label saving of {better} over {other}: {entry['undefined']}"
    known = [each for each in entry["by_size"] if each["factor"] is not None]
    last = (known or entry["by_size"])[-1]
    ends = f"{_share(last, 'low')} to {_share(last, 'high')}"
    return f"{better} needs {_share(last, 'factor')} ({ends}) of the {last['size']} training records that {other} needs"


def summary(results: dict[str, Any]) -> str:
    """A few lines for the console."""
    names = list(results["models"])
    width = max(len(name) for name in names) + 2
    lines = [
        f"{results['task']}, {results['metric']}, mean of {results['config']['seeds']} draws",
        f"  {'records':<{width}}" + "".join(f"{size:>8}" for size in results["sizes"]),
    ]
    for name, model in results["models"].items():
        lines.append(f"  {name:<{width}}" + "".join(f"{_number(v, '.3f'):>8}" for v in model["mean"]))
    for name, model in results["models"].items():
        if fit := model["fit"]:
            ends = ", ".join(
                f"{number} {_number(fit[f'{number}_low'], digits)} to {_number(fit[f'{number}_high'], digits)}"
                for number, digits in (("a", ".2f"), ("L0", ".3g"))
            )
            lines.append(f"  {name}: error = {fit['C']:.3g} N^-{fit['a']:.3g} + {fit['L0']:.3g} ({ends})")
    for better, others in results["saving"].items():
        lines += [f"  {saving_in_words(better, other, entry)}" for other, entry in others.items()]
    lines.append(f"  labels beside those of the training records: {results['validation']}")
    return "\n".join(lines)
