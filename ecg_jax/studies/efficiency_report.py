"""The figures of `ecg-jax efficiency` as tables: aligned for the terminal, and in Markdown."""

from collections.abc import Sequence
from typing import Any

from ecg_jax.studies import published_costs
from ecg_jax.studies.published_costs import Compared
from ecg_jax.studies.roofline import Roofline

COST_HEAD = (
    "backbone", "objective", "precision", "batch", "parameters", "encoder forward GFLOP", "encoder backward GFLOP",
    "step forward GFLOP", "step backward GFLOP", "compiled encoder forward", "compiled encoder backward",
    "compiled step forward", "compiled step backward",
)  # fmt: skip
MEMORY_HEAD = (
    "backbone", "objective", "precision", "batch", "encoder parameters", "least GB", "compiler's GB", "peak GB",
    "device's peak GB", "compile s",
)  # fmt: skip
PUBLISHED_HEAD = ("backbone", "quantity", "published", "ours", "published / ours", "counted as published")
SPEED_HEAD = (
    "backbone", "objective", "precision", "batch", "forward w/s", "fwd+bwd w/s", "step w/s", "quartiles",
    "step / fwd+bwd", "forward of roof", "fwd+bwd of roof", "step of roof", "step copy",
)  # fmt: skip
FIT_HEAD = ("backbone", "over", "cost", "exponent", "standard error", "last doubling")
NOTES = """\
Operations. GFLOP are of one window, by formula: 2 for a multiply-add of convolutions and matrix products; FFTs are not
counted. "encoder" is stem and backbone, "step" the whole training step with heads and teacher. "compiled" is what XLA
counts in the programs it makes, everything included: "forward" of the encoder in evaluation mode, of the step the loss
in train mode; "backward" is what the whole program has beyond that, of the encoder the dropout and batch statistics of
train mode too, of the step the update of parameters and teacher too.
Memory. GB are of one training step: "least" is a lower bound, every argument read and every output written once;
"compiler's" is XLA's estimate of traffic, the operands and results of every operation; "peak" is what XLA plans to hold
at once, "device's peak" what the device saw ("-": it does not say, or an earlier row took more). "compile s" is of the
step, without JAX's persistent cache (with --quick it tells nothing).
Speed. w/s are windows a second, medians of turns that all programs take: "forward" the encoder in evaluation mode,
"fwd+bwd" the encoder in train mode with the gradient of its parameters, "step" the whole training step, with its
quartiles. "of roof" are shares of the roofline, which takes the operations by formula and the least traffic. "step
copy" is how long this device takes to copy as much as the compiler estimates for the step, relative to the time of
the step; it exceeds 100 % where caches serve part of it."""
#: Of `published_costs`.
PUBLISHED_NOTES = f"""\
Published figures are of one crop ({published_costs.SOURCE}); ours of the encoder, stem and backbone, as the shipped
configs have it, for a window of 2.5 s, whatever was measured above. Parameters are in millions, the others GFLOP;
"backward" is forward and backward together, which is what gives the published 5.213 of S4. "counted as published" is
our formula under a reading that gives every published digit: the Transformer and the Net1D see 600 tokens, the
samples of a crop, where ours see 300, and have beside the backbone an input convolution and a single product of 512 x
512 at each token, where our stem has three; and of the Net1D the gradient of grouped weights counts as if they were
dense (47.3 of the 73.8 GFLOP, never computed). That is arithmetic, not knowledge of how the paper measured: its code
for that is not public."""


def cost_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Operations of a window, a line for each row under `COST_HEAD`."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append((*_first(row), row["failed"], *("",) * (len(COST_HEAD) - 5)))
            continue
        counts = [*row["flops_per_window"].values(), *row["compiler_flops_per_window"].values()]
        lines.append(
            (*_first(row), _thousands(row["parameters"]), *(_number(count, 1e9, ".3f") for count in counts))
        )
    return lines


def memory_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What a step reads, writes and holds, under `MEMORY_HEAD`; rows that failed have no line."""
    lines = []
    for row in rows:
        if "failed" in row:
            continue
        step = row["programs"]["step"]
        lines.append(
            (
                *_first(row),
                _thousands(row["encoder_parameters"]),
                _number(step["least_bytes"], 1e9, ".3f"),
                _number(step["compiler_bytes"], 1e9, ".2f"),
                _number(step["peak_bytes"], 1e9, ".2f"),
                _number(row["device_peak_bytes"], 1e9, ".2f"),
                f"{step['compile_s']:.1f}",
            )
        )
    return lines


def published_cells(compared: Sequence[Compared]) -> list[tuple[str, ...]]:
    """The published figures beside ours, under `PUBLISHED_HEAD`."""
    return [
        (
            row.backbone,
            {"parameters": "parameters, M", "forward": "forward, GFLOP", "backward": "backward, GFLOP"}[
                row.quantity
            ],
            f"about {row.digits}" if row.about else row.digits,
            f"{row.ours:.3f}",
            f"{row.ratio:.2f}",
            f"{row.counted:.3f}",
        )
        for row in compared
    ]


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


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", " ")


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


def report(
    rows: Sequence[dict[str, Any]],
    compared: Sequence[Compared],
    roofline: Roofline,
    provenance: dict[str, Any],
) -> str:
    """efficiency.md."""
    about = ", ".join(f"{name} {value}" for name, value in provenance["versions"].items())
    return (
        "\n\n".join(
            [
                "# Efficiency",
                f"{describe(roofline, provenance['device_kind'])}. {about}. Windows of {provenance['window_s']:g} s; "
                f"{provenance['repeats']} turns.",
                "## Operations",
                markdown(COST_HEAD, cost_cells(rows)),
                "## Memory",
                markdown(MEMORY_HEAD, memory_cells(rows)),
                "## Speed",
                markdown(SPEED_HEAD, speed_cells(rows)),
                NOTES,
                "## Beside the published figures",
                markdown(PUBLISHED_HEAD, published_cells(compared), 2),
                PUBLISHED_NOTES,
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
