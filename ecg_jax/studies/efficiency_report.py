"""The figures of `ecg-jax efficiency` as tables: aligned for the terminal, and in Markdown."""

from collections.abc import Sequence
from typing import Any

from ecg_jax.studies.roofline import Roofline

COST_HEAD = (
    "backbone", "objective", "precision", "batch", "parameters", "encoder forward GFLOP", "step GFLOP",
    "compiler's GFLOP", "least GB", "compiler's GB", "peak GB", "compile s",
)  # fmt: skip
SPEED_HEAD = (
    "backbone", "objective", "precision", "batch", "forward w/s", "fwd+bwd w/s", "step w/s", "quartiles",
    "step / fwd+bwd", "forward of roof", "fwd+bwd of roof", "step of roof", "step copy",
)  # fmt: skip
FIT_HEAD = ("backbone", "over", "cost", "exponent", "standard error", "last doubling")
NOTES = """\
Cost. GFLOP are of one window, 2 for a multiply-add of convolutions and matrix products; FFTs are not counted.
"compiler's GFLOP" is what XLA counts for the step. GB are of one training step: "least" is a lower bound, every
argument read and every output written once; "compiler's" is XLA's estimate, the operands and results of every
operation; "peak" is what XLA plans to hold at once. "compile s" is of the step, without JAX's persistent cache.
Speed. w/s are windows a second, medians of turns that all programs take: "forward" the encoder in evaluation mode,
"fwd+bwd" the encoder in train mode with the gradient of its parameters, "step" the whole training step, with its
quartiles. "of roof" are shares of the roofline, which takes the operations by formula and the least traffic. "step
copy" is how long this device takes to copy as much as the compiler estimates for the step, relative to the time of
the step; it exceeds 100 % where caches serve part of it."""


def cost_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What a window and a step cost, a line for each row under `COST_HEAD`."""
    lines = []
    for row in rows:
        first = _first(row)
        if "failed" in row:
            lines.append((*first, row["failed"], *("",) * (len(COST_HEAD) - 5)))
            continue
        forward, step = row["programs"]["forward"], row["programs"]["step"]
        compiler_flops, compiler_bytes = step["compiler_flops_per_window"], step["compiler_bytes"]
        lines.append(
            (
                *first,
                f"{row['parameters']:,}".replace(",", " "),
                f"{forward['flops_per_window'] / 1e9:.3f}",
                f"{step['flops_per_window'] / 1e9:.3f}",
                _number(compiler_flops, 1e9, ".3f"),
                _number(step["least_bytes"], 1e9, ".3f"),
                _number(compiler_bytes, 1e9, ".2f"),
                _number(step["peak_bytes"], 1e9, ".2f"),
                f"{step['compile_s']:.1f}",
            )
        )
    return lines


def speed_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """How fast each row is, under `SPEED_HEAD`; rows that failed have no line."""
    lines = []
    for row in rows:
        if "failed" in row:
            continue
        programs = [row["programs"][name] for name in ("forward", "forward_backward", "step")]
        step = programs[2]
        lines.append(
            (
                *_first(row),
                *(_rate(program["windows_per_s"]) for program in programs),
                f"{_rate(step['windows_per_s_low'])}-{_rate(step['windows_per_s_high'])}",
                f"{row['step_over_encoder']:.2f}",
                *(f"{program['fraction_of_roofline']:.1%}" for program in programs),
                _number(step["fraction_of_copy"], 1, ".0%"),
            )
        )
    return lines


def _first(row: dict[str, Any]) -> tuple[str, ...]:
    return row["backbone"], row["objective"], row["precision"], str(row["batch"])


def _number(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def in_flops(rate: float) -> str:
    """Operations per second in GFLOP/s or TFLOP/s."""
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int = 3) -> str:
    """A table for the terminal; headings of several words take several lines. All but the first columns are
    numbers.
    """
    words = [name.split(" ") for name in head]
    height = max(len(parts) for parts in words)
    heads = [tuple(([""] * (height - len(parts)) + parts)[i] for parts in words) for i in range(height)]
    table = [*heads, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]

    def text(line):
        cells = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([*map(text, heads), "-" * (sum(widths) + 2 * len(widths) - 2), *map(text, lines)])


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int = 3) -> str:
    """The same table in Markdown."""
    rule = ["---" if i < text_columns else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def describe(roofline: Roofline, device: str) -> str:
    """The roofline in one sentence."""
    rates = ", ".join(
        f"{in_flops(rate)} in {name} ({roofline.matrix_rows[name]} rows)"
        for name, rate in roofline.flops_per_s.items()
    )
    return (
        f"{device}: copies {roofline.copy_bytes_per_s / 1e9:.3g} GB/s (read and written, "
        f"{roofline.copy_bytes / 2**20:.0f} MiB), multiplies matrices at {rates}"
    )


def report(rows: Sequence[dict[str, Any]], roofline: Roofline, provenance: dict[str, Any]) -> str:
    """efficiency.md."""
    about = ", ".join(f"{name} {value}" for name, value in provenance["versions"].items())
    return (
        "\n\n".join(
            [
                "# Efficiency",
                f"{describe(roofline, provenance['device_kind'])}. {about}. Windows of {provenance['window_s']:g} s; "
                f"{provenance['repeats']} turns.",
                "## Cost",
                markdown(COST_HEAD, cost_cells(rows)),
                "## Speed",
                markdown(SPEED_HEAD, speed_cells(rows)),
                NOTES,
            ]
        )
        + "\n"
    )


def fit_cells(fits: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The fitted exponents of `cost_scaling.fit_all`, under `FIT_HEAD`."""
    return [
        (
            fit["backbone"],
            fit["axis"],
            fit["cost"],
            f"{fit['exponent']:.3f}",
            _number(fit["standard_error"], 1, ".3f"),
            f"{fit['last']:.3f}",
        )
        for fit in fits
    ]
