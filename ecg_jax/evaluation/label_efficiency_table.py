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


def summary(results: dict[str, Any]) -> str:
    """A few lines for the console."""
    names = list(results["models"])
    width = max(len(name) for name in names) + 2
    lines = [
        f"{results['task']}, {results['metric']}, mean of {results['config']['seeds']} draws",
        f"  {'records':<{width}}" + "".join(f"{size:>8}" for size in results["sizes"]),
    ]
    for name, model in results["models"].items():
        lines.append(f"  {name:<{width}}" + "".join(f"{value:8.3f}" for value in model["mean"]))
    for name, model in results["models"].items():
        if fit := model["fit"]:
            ends = (
                f"a {fit['a_low']:.2f} to {fit['a_high']:.2f}, L0 {fit['L0_low']:.3g} to {fit['L0_high']:.3g}"
            )
            lines.append(f"  {name}: error = {fit['C']:.3g} N^-{fit['a']:.3g} + {fit['L0']:.3g} ({ends})")
    for better, others in results["saving"].items():
        for other, entry in others.items():
            if "undefined" in entry:
                lines.append(f"  label saving of {better} over {other}: {entry['undefined']}")
                continue
            defined = [e for e in entry["by_size"] if e["factor"] is not None]
            if not defined:
                lines.append(
                    f"  label saving of {better} over {other}: undefined, {entry['by_size'][-1]['undefined']}"
                )
                continue
            last = defined[-1]
            ends = "" if last["low"] is None else f" ({last['low']:.2g} to {last['high']:.2g})"
            lines.append(
                f"  {better} needs {last['factor']:.2g}{ends} of the {last['size']} records that {other} needs"
            )
    return "\n".join(lines)
