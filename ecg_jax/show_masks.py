"""`ecg-jax show-masks`: a picture of what a masked objective hides from the model, and what it asks back."""

import argparse
import contextlib
import functools
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import parse_command
from ecg_jax.data.mixture import parse_weights
from ecg_jax.data.pipeline import train_batches
from ecg_jax.data.preprocessing import MICROVOLTS_PER_MV
from ecg_jax.data.selection import select_as_configured
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.objectives.masking import STRATEGIES, Mask, Masking
from ecg_jax.prepare import prepare
from ecg_jax.quickstart import SAMPLE
from ecg_jax.run_setup import OBJECTIVES, build_masking, open_store
from ecg_jax.training.train_state import seed_keys, step_keys

DESCRIPTION = """\
Draws what a masked objective does not see and what it has to predict, on the first recordings that a run with this
config would train on: the same crops, and the masks of its first step. Without --config.store the recordings are
those of the PTB-XL sample that ships with the package.

  ecg-jax show-masks --config=configs/jepa.py --output=masks.png
  ecg-jax show-masks --config=configs/data2vec.py:mask=lead --config.objective.mask.ratio=0.25 --output=masks.png
"""
SUFFIXES = (".png", ".svg", ".pdf")
MOST_RECORDS = 16
DRAWS = 1000

#: Values of `shown`: the model sees a sample; it does not, and is not asked about it; it does not, and is asked.
SEEN, HIDDEN, PREDICTED = 0, 1, 2
_COLORS = ("#FFFFFF", "#D3D6DA", "#F7C9A3")
_STRIP, _TRACE, _FAINT = "#D55E00", "#101010", "#8C8C8C"


class Crops(NamedTuple):
    """The first records of the first batch of a run."""

    signal: np.ndarray
    """float32 [B, T, C] in millivolts."""
    record_index: np.ndarray
    """int32 [B], number of each record within the global batch."""
    names: list[str]
    """B record ids."""
    leads: tuple[str, ...]
    rate_hz: float
    corpus: str


class Shares(NamedTuple):
    """Means over draws."""

    hidden: float
    """Tokens that the backbone does not see; when the signal is masked, samples that are set to zero."""
    predicted: float
    """Tokens that are predicted at least once."""


class _ObjectiveKey(nn.Module):
    """The first key that an objective takes from its stream."""

    def __call__(self) -> jax.Array:
        return self.make_rng("objective")


def mask_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key from which an objective draws the masks of a training step (see `training.train_state.train_step`).

    Args:
        seed: `config.seed`.
        step: optimiser updates done before.
    """
    _, run_key = seed_keys(seed)
    objective_key, _ = step_keys(run_key, step)
    return _ObjectiveKey().apply({}, rngs={"objective": objective_key})


def masks_of_step(
    masking: Masking, record_index: np.ndarray, *, seed: int, step: int, samples: int, leads: int
) -> Mask:
    """The masks, as numpy arrays, that training draws at a step for the records numbered record_index [B]."""
    draw = jax.jit(functools.partial(masking.draw, samples=samples, leads=leads))
    return jax.device_get(draw(mask_key(seed, step), jnp.asarray(record_index)))


def mean_shares(masking: Masking, *, seed: int, samples: int, leads: int, draws: int = DRAWS) -> Shares:
    """What is hidden and predicted on average: of the first record of a batch over so many steps."""

    def one_step(step):
        mask = masking.draw(mask_key(seed, step), jnp.zeros(1, jnp.int32), samples=samples, leads=leads)
        return shares(mask)

    steps = jax.jit(lambda: jax.lax.map(one_step, jnp.arange(draws)))()
    return Shares(*(float(values.mean()) for values in steps))


def shares(mask: Mask) -> Shares:
    """The shares of a batch of masks."""
    hidden = mask.hidden if mask.signal is None else mask.signal
    return Shares(hidden.mean(), (mask.targets > 0).mean())


def shown(mask: Mask, record: int, *, samples: int, leads: int) -> np.ndarray:
    """uint8 [T, C]: whether the model sees each sample of a record, and if not, whether its token is predicted.

    Samples 2t and 2t+1 belong to token t.
    """

    def of_samples(of_tokens):
        return np.repeat(of_tokens, 2)[:samples, None]

    hidden = of_samples(mask.hidden[record]) if mask.signal is None else mask.signal[record]
    state = np.where(of_samples(mask.targets[record] > 0), PREDICTED, HIDDEN)
    return np.where(np.broadcast_to(hidden, (samples, leads)), state, SEEN).astype(np.uint8)


def first_crops(config: ConfigDict, seed: int, records: int) -> Crops:
    """What a run with this config and seed reads first.

    Raises:
        UserError: the store and the config do not fit together, or no recording is long enough.
    """
    store, preprocessing = open_store(config)
    samples = preprocessing.window_samples
    selection = select_as_configured(store, config.data.to_dict(), samples)
    batches = train_batches(
        store,
        selection.train,
        batch_size=config.batch_size,
        window_samples=samples,
        seed=seed,
        shares=parse_weights(config.data.weights),
    )
    with contextlib.closing(batches):
        batch = next(batches)
    rows = batch["row"][:records]
    kept = np.isin(ALL_LEADS, preprocessing.kept_leads)
    return Crops(
        signal=batch["signal"][:records].astype(np.float32) / MICROVOLTS_PER_MV * kept,
        record_index=batch["record_index"][:records],
        names=store.arrow_column("record_id").take(rows).to_pylist(),
        leads=tuple(store.leads),
        rate_hz=store.rate_hz,
        corpus=" and ".join(each.corpus for each in store.stores),
    )


def draw_masks(crops: Crops, mask: Mask, *, title: str, notes: Sequence[str] = (), blocks: bool = False):
    """A figure with one panel of all leads for each record.

    Args:
        crops: B recordings.
        mask: their masks, numpy arrays.
        title: first line.
        notes: further lines below it.
        blocks: the legend speaks of context and targets.

    Returns:
        A `matplotlib.figure.Figure`; each panel's image holds `shown` transposed, [C, T].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    records = len(crops.names)
    columns = min(records, 2)
    rows = -(-records // columns)
    width, panel, head, foot = (7.4 * columns if columns > 1 else 9.0), 4.9, 0.4 + 0.24 * len(notes), 0.45
    height = rows * panel + head + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    most = max(1, int(mask.targets.max()))
    for record, axes in enumerate(grid):
        if record < records:
            _draw_panel(axes, crops, mask, record, most)
        else:
            axes.set_visible(False)

    what = "set to zero" if mask.signal is not None else "hidden"
    states = np.stack(
        [shown(mask, b, samples=_samples(crops), leads=len(crops.leads)) for b in range(records)]
    )
    labels = {
        SEEN: "seen by the model",
        PREDICTED: f"{what}, its token to be predicted",
        HIDDEN: f"{what}, not to be predicted",
    }
    if blocks:
        labels = {
            SEEN: "context (seen)",
            PREDICTED: "targets (hidden, to be predicted)",
            HIDDEN: "neither (hidden)",
        }
    patches = [
        Patch(facecolor=_COLORS[state], edgecolor="#707070", linewidth=0.6, label=label)
        for state, label in labels.items()
        if (states == state).any()
    ]
    for times, color in enumerate(_strip_colors(most), start=1):
        label = "predicted" if most == 1 else f"predicted {times} times" if times > 1 else "predicted once"
        patches.append(Patch(facecolor=color, label=label))
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=len(patches) if columns > 1 else 3,
        frameon=False,
        fontsize=10,
        handlelength=1.4,
        columnspacing=1.4,
    )
    x = 0.02 if columns > 1 else 0.03
    figure.text(x, 1 - 0.12 / height, title, fontsize=13, weight="bold", va="top")
    for line, note in enumerate(notes):
        figure.text(x, 1 - (0.42 + 0.24 * line) / height, note, fontsize=10, va="top", color="#404040")
    figure.tight_layout(rect=(0, foot / height, 1, 1 - head / height), h_pad=1.2, w_pad=1.5)
    return figure


def _samples(crops: Crops) -> int:
    return crops.signal.shape[1]


def _draw_panel(axes, crops: Crops, mask: Mask, record: int, most: int) -> None:
    """Lead c lies in the band from c to c+1, downwards; the strip of targets above the first."""
    from matplotlib.colors import ListedColormap

    samples, leads = crops.signal.shape[1:]
    end = samples / crops.rate_hz
    state = shown(mask, record, samples=samples, leads=leads)
    picture = {"aspect": "auto", "interpolation": "nearest", "zorder": 0}
    axes.imshow(
        state.T,
        extent=(0, end, leads, 0),
        cmap=ListedColormap(_COLORS),
        vmin=SEEN - 0.5,
        vmax=PREDICTED + 0.5,
        **picture,
    )
    top = -0.75
    axes.imshow(
        np.repeat(mask.targets[record], 2)[None, :samples],
        extent=(0, end, -0.2, top),
        cmap=ListedColormap(["#FFFFFF", *_strip_colors(most)]),
        vmin=-0.5,
        vmax=most + 0.5,
        **picture,
    )
    axes.plot(
        [0, end, end, 0, 0], [-0.2, -0.2, top, top, -0.2], color="#B0B0B0", linewidth=0.6, clip_on=False
    )

    traces = crops.signal[record] - np.median(crops.signal[record], axis=0)
    band_mv = _band_mv(traces)
    time = (np.arange(samples) + 0.5) / crops.rate_hz
    for c in range(leads):
        y = c + 0.5 - traces[:, c] / band_mv
        axes.plot(time, y, color=_FAINT, linewidth=0.6, zorder=2)
        axes.plot(time, np.where(state[:, c] == SEEN, y, np.nan), color=_TRACE, linewidth=1.0, zorder=3)
    axes.set_xlim(0, end)
    axes.set_ylim(leads, top)
    axes.set_yticks([(top - 0.2) / 2, *(np.arange(leads) + 0.5)], ["predict", *crops.leads])
    axes.get_yticklabels()[0].set_color(_STRIP)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time in s")
    axes.spines[["top", "right", "left"]].set_visible(False)
    # 1 mV, right of the lowest lead.
    bar = end * 1.012
    axes.plot([bar, bar], [leads - 1 / band_mv, leads], color=_TRACE, linewidth=1.6, clip_on=False)
    axes.text(end * 1.02, leads - 0.5 / band_mv, "1 mV", rotation=90, va="center", ha="left", fontsize=8)
    own = shares(jax.tree.map(lambda a: a[record : record + 1], mask))
    axes.set_title(
        f"{crops.corpus} record {crops.names[record]}: {_percentages(own, mask)}", loc="left", fontsize=10
    )


def _percentages(values: Shares, mask: Mask) -> str:
    of = "tokens" if mask.signal is None else "samples"
    hidden = f"{100 * values.hidden:.1f} % of {of} hidden"
    return f"{hidden}, {100 * values.predicted:.1f} % of tokens predicted"


def _band_mv(traces: np.ndarray) -> float:
    """Millivolts in the band of a lead, so that few traces leave their own."""
    span = np.ptp(traces, axis=0)
    return float(np.clip(np.percentile(span, 90), 0.5, 5.0))


def _strip_colors(most: int) -> list[str]:
    """Colours of tokens that are predicted 1 .. `most` times."""
    from matplotlib.colors import to_hex, to_rgb

    strip = np.array(to_rgb(_STRIP))
    return [to_hex(1 - (1 - strip) * (0.3 + 0.7 * times / most)) for times in range(1, most + 1)]


def show_masks(config: ConfigDict, output: str | Path, *, records: int = 4, seed: int | None = None) -> None:
    """Writes the picture.

    Args:
        config: of a pretraining run with a masked objective.
        output: picture to write (.png, .svg or .pdf).
        records: panels.
        seed: takes the place of `config.seed`.

    Raises:
        UserError: nothing is masked in this config, its masks cannot be drawn, or the picture cannot be written.
    """
    output = Path(output)
    seed = config.seed if seed is None else seed
    masking = _checked(config, output, records, seed)
    with _sample_if_unset(config) as config:
        crops = first_crops(config, seed, records)
    _, samples, leads = crops.signal.shape
    window = {"samples": samples, "leads": leads}
    mask = masks_of_step(masking, crops.record_index, seed=seed, step=0, **window)
    mean = mean_shares(masking, seed=seed, **window)
    fields = ", ".join(f"{name}={getattr(masking, name)}" for name in STRATEGIES[masking.strategy])
    figure = draw_masks(
        crops,
        mask,
        title=f"{config.objective.name}, mask.strategy={masking.strategy}",
        notes=[
            fields,
            f"mean of {DRAWS} draws: {_percentages(mean, mask)}",
            f"crops and masks of the first records of step 1 of a run with seed {seed}",
        ],
        blocks=masking.strategy == "block",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=output.suffix[1:].lower(), dpi=110)
    write_atomic(output, buffer.getvalue())
    print(f"{output}: {masking.strategy} masks, mean of {DRAWS} draws: {_percentages(mean, mask)}")


def _checked(config: ConfigDict, output: Path, records: int, seed: int) -> Masking:
    """The masking of a config, once everything that can be told at once is right."""
    if output.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output={output} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}")
    if isinstance(config.objective, ConfigDict) and "mask" not in config.objective:
        masked = [name for name, module in OBJECTIVES.items() if "mask" in module.__dataclass_fields__]
        raise UserError(
            f"the objective {config.objective.name} hides nothing from the model, so there is nothing to show; "
            f"show-masks is for the masked objectives: {', '.join(masked)}"
        )
    check_config(config)
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed={seed} must be at least 0 and below 2^63")
    most = min(MOST_RECORDS, config.batch_size)
    if not 1 <= records <= most:
        raise UserError(f"--records={records} must lie between 1 and {most}")
    return build_masking(config)


@contextlib.contextmanager
def _sample_if_unset(config: ConfigDict) -> Iterator[ConfigDict]:
    """The config, with a store of the shipped sample while it is in use if it names none."""
    if config.store is not None:
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        prepare("ptbxl", SAMPLE, store, workers=1, progress=False)
        yield ConfigDict(config.to_dict() | {"store": str(store)})


def main(argv: list[str]) -> int:
    """Entry point of `ecg-jax show-masks`."""

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--output", required=True, metavar="FILE", help=f"picture to write: {', '.join(SUFFIXES)}"
        )
        parser.add_argument(
            "--records",
            type=int,
            default=4,
            metavar="N",
            help=f"recordings to draw, at most {MOST_RECORDS} (default: %(default)s)",
        )
        parser.add_argument("--seed", type=int, metavar="N", help="of crops and masks (default: config.seed)")

    config, args = parse_command("show-masks", DESCRIPTION, argv, options, like="configs/cpc.py")
    show_masks(config, args.output, records=args.records, seed=args.seed)
    return 0
