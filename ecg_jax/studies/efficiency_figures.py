"""The figures and tables of `ecg-jax efficiency`, with a paragraph on what each shows and what it does not."""

from collections.abc import Sequence
from typing import Any

from ecg_jax.studies import efficiency_plots, efficiency_report
from ecg_jax.studies.figure_folder import Figure
from ecg_jax.studies.published_costs import DIFFERENCE, Compared
from ecg_jax.studies.roofline import Roofline

_STEP_COLUMNS = (
    "backbone", "objective", "precision", "batch", "flop_per_byte", "flops_per_s", "fraction_of_roofline", "bound",
    "windows_per_s", "windows_per_s_low", "windows_per_s_high", "peak_bytes",
)  # fmt: skip
_QUICK = (
    "The models were made narrow and shallow (--quick) and the batch small: neither these figures nor their "
    "ratios are those of the models that the configs train. "
)


def table_figures(rows: Sequence[dict[str, Any]], roofline: Roofline, about: dict[str, Any]) -> list[Figure]:
    """The picture of speeds and the three tables.

    Args:
        rows: of `efficiency.measure`.
        roofline: of the device.
        about: `device_kind`, `platform`, `processors`, `repeats`, `window_s` and `quick` of the measurement.
    """
    measured = [row for row in rows if "programs" in row]
    quick = _QUICK if about["quick"] else ""
    figures = []
    if measured:
        figures.append(
            Figure(
                "efficiency",
                f"Speed and memory of a training step on {about['device_kind']}",
                _speed_shows(measured, about),
                f"{quick}One device, windows of {about['window_s']:g} s. A run also reads its data, "
                "validates, saves and, on several devices, communicates. FLOPs are counted by formula "
                "without FFTs, norms and the generation of S4 kernels, so a share of the roofline is of "
                "the counted work, not of all work. Quartiles are over turns in one process on one "
                "occasion: they do not say how another day or machine would differ.",
                _STEP_COLUMNS,
                [_step_line(row) for row in measured],
                efficiency_plots.draw_table(measured, roofline, about["device_kind"]),
            )
        )
    failed = [row for row in rows if "failed" in row]
    lost = f" {len(failed)} of {len(rows)} rows did not fit into memory and say so." if failed else ""
    figures.append(
        Figure(
            "operations",
            "Parameters and operations of a window, forward and backward",
            "Operations of one window, by formula (a multiply-add is 2; convolutions and matrix products) "
            "and as XLA counts them in the compiled programs, of the encoder and of the whole training "
            f"step, forward and backward apart, in GFLOP.{lost}",
            f"{quick}The two counts are of different things: the compiler's has norms, activations, "
            "dropout, masks and the optimiser, counts the matrix products that a convolution was turned "
            "into, and on some devices leaves out FFTs. Its backward is a difference of two programs, so "
            "that what XLA fuses or drops in one of them lands there. Neither is a time.",
            efficiency_report.COST_HEAD,
            efficiency_report.cost_cells(rows),
        )
    )
    if measured:
        figures.append(
            Figure(
                "memory",
                "Memory and traffic of a training step",
                "What a step reads and writes at least, the compiler's estimate of its traffic, what it "
                "holds at once by the compiler's plan, what the device saw, and how long the program took "
                "to compile.",
                f"{quick}The memory of a run is larger: batches that are read ahead, checkpoints being "
                "written, and the allocator's own blocks come on top. "
                + (
                    "Compile times tell nothing here: several programs were compiled at once, or read from "
                    "JAX's cache."
                    if about["quick"]
                    else "Compile times are without JAX's cache; a run's second start reads it."
                ),
                efficiency_report.MEMORY_HEAD,
                efficiency_report.memory_cells(rows),
            )
        )
        figures.append(
            Figure(
                "speed",
                "Windows per second and shares of the roofline",
                "Windows per second of the encoder's forward pass, of its forward and backward pass, and "
                f"of the whole training step, medians of {about['repeats']} turns that all programs take "
                "one after the other, and their shares of what the device reached in matrix products and "
                "copies.",
                f"{quick}Differences of a few percent are within what a shared machine moves between two "
                "turns; the quartiles of the step are beside it.",
                efficiency_report.SPEED_HEAD,
                efficiency_report.speed_cells(rows),
            )
        )
    return figures


def _speed_shows(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """A paragraph from the figures themselves."""

    def speed(row):
        return row["programs"]["step"]["windows_per_s"]

    def name(row):
        return f"{efficiency_plots.LOOKS[row['backbone']][2]} with {row['objective']} in {row['precision']}"

    fastest, slowest = max(rows, key=speed), min(rows, key=speed)
    text = (
        "Left, operations per second of each training step over its operations per byte, under the roofline "
        "of this device (copies and matrix products, measured in the same process). Middle, windows per "
        f"second, the lines from the lower to the upper quartile of {about['repeats']} turns. Right, the "
        f"memory that the step holds at once by the compiler's plan. Fastest is {name(fastest)} "
        f"({speed(fastest):.3g} windows a second)"
    )
    if fastest is not slowest:
        text += f", slowest {name(slowest)} ({speed(slowest):.3g})"
    by_key = {(r["backbone"], r["objective"], r["batch"], r["precision"]): speed(r) for r in rows}
    ratios = [
        rate / by_key[*key, "float32"]
        for (*key, precision), rate in by_key.items()
        if precision == "bfloat16" and (*key, "float32") in by_key
    ]
    if ratios:
        text += f"; bfloat16 makes {min(ratios):.2f} to {max(ratios):.2f} times the windows of float32"
    return text + "."


def _step_line(row: dict[str, Any]) -> list[Any]:
    step = row["programs"]["step"]
    per_byte = efficiency_plots.flop_per_byte(row)
    values = {"flop_per_byte": per_byte, **row, **step}
    return [values[name] for name in _STEP_COLUMNS]


def published_figure(compared: Sequence[Compared]) -> Figure:
    """The published figures beside ours, and the counting that gives them."""
    theirs = {row.backbone: row for row in compared if row.quantity == "forward"}
    ratios = ", ".join(
        f"{efficiency_plots.LOOKS[name][2]} {row.digits} against our {row.ours:.2f} ({row.ratio:.2f} times)"
        for name, row in theirs.items()
    )
    differences = "; ".join(f"{efficiency_plots.LOOKS[name][2]}: {DIFFERENCE[name]}" for name in theirs)
    every = "every" if all(row.reproduced for row in compared) else "not every"
    return Figure(
        "published",
        "Parameters and operations beside the published figures",
        f"Of one crop, forward, in GFLOP: {ratios}. What differs: {differences}. The open markers are our "
        f"formula under that reading, which gives {every} published figure to the digits that were "
        "published.",
        "How the paper measured: its code for that is not public, and that a counting gives all of its "
        "figures does not prove that it is the one used. The extra product at each token may be a "
        "convolution of the stem or a head. Nothing here depends on what was measured on this device: ours "
        "are the shipped configs at full size.",
        (
            "backbone",
            "quantity",
            "unit",
            "published",
            "ours",
            "published_over_ours",
            "counted_as_published",
            "agrees",
        ),
        [
            (
                row.backbone,
                "forward and backward" if row.quantity == "backward" else row.quantity,
                "million" if row.quantity == "parameters" else "GFLOP",
                f"about {row.digits}" if row.about else row.digits,
                round(row.ours, 4),
                round(row.ratio, 3),
                round(row.counted, 4),
                row.reproduced,
            )
            for row in compared
        ],
        efficiency_plots.draw_published(compared),
    )


def scaling_figure(
    rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], about: dict[str, Any]
) -> Figure:
    """Time and memory of the encoder over window length and batch.

    Args:
        rows, fits: of `cost_scaling`.
        about: as in `efficiency_plots.draw_scaling`.
    """
    said = "; ".join(
        f"{efficiency_plots.LOOKS[fit['backbone']][2]}, {fit['cost']} over {fit['axis']}: exponent "
        f"{fit['exponent']:.2f}, last doubling {fit['last']:.2f}"
        for fit in fits
    )
    columns = (
        "backbone",
        "axis",
        "x",
        "batch",
        "seconds",
        "seconds_low",
        "seconds_high",
        "temporary_bytes",
        "failed",
    )
    return Figure(
        "scaling",
        f"How time and memory of the encoder grow on {about['device_kind']}",
        "Time (with quartiles over turns) and temporary memory of the encoder's forward and backward pass "
        f"over the length of the window and over the batch, with fitted exponents: {said}.",
        (_QUICK if about["quick"] else "")
        + "An exponent over a few sizes is a description of these sizes: small programs have constant "
        "costs that pull it down, and attention bends upwards, which is why the last doubling stands "
        "beside it.",
        columns,
        [[row.get(name) for name in columns] for row in rows],
        efficiency_plots.draw_scaling(rows, fits, about),
    )
