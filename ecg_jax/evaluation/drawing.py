"""What pictures of several models share: figures, looks, legends, and writing them as SVG or PNG.

Text in SVG stays text: it is set in whatever sans-serif font the reader's machine has, and laid out with DejaVu Sans,
which is wider than most.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ecg_jax.evaluation.plots import LIGHT, LOOKS
from ecg_jax.files import write_atomic

#: Most models that one picture shows legibly.
MOST_MODELS = len(LOOKS)
#: Colour and marker by name.
Looks = Mapping[str, tuple[str, str]]


def new_figure(width_inch: float, height_inch: float):
    """A figure that belongs to no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_svg(figure) -> bytes:
    """A figure as small SVG, the same for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ecg_jax",
        "font.sans-serif": ["DejaVu Sans"],
    }
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    # Comments, metadata, names of groups and digits far below a pixel are half of the file.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", buffer.getvalue().decode(), flags=re.DOTALL)
    text = re.sub(r"\n\s*", " ", text).replace("> <", "><")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r'="[^"]*"', lambda value: re.sub(r"(\.\d\d)\d+", r"\1", value[0]), text).encode()


def looks_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name, so that a name looks alike in all pictures of a page; up to 64 differ."""
    n = len(LOOKS)
    return {name: (LOOKS[i % n][0], LOOKS[(i + i // n) % n][1]) for i, name in enumerate(names)}


def plain_axes(axes, grid: str = "both") -> None:
    """A light grid, and no frame on the right and above."""
    axes.grid(axis=grid, color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def add_legend(figure, looks: Looks, extra=(), columns: int = 3) -> None:
    """A legend below the panels: the models, then lines of other styles (keyword arguments of Line2D each)."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.4, label=name)
        for name, (color, marker) in looks.items()
    ]
    handles += [Line2D([], [], **style) for style in extra]
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)


def save(figure, path: str | Path, dpi: float = 150) -> None:
    """Writes a figure as its suffix says: .svg, or .png, .pdf.

    Raises:
        UserError: it cannot be written.
    """
    path, buffer = Path(path), io.BytesIO()
    if path.suffix.lower() == ".svg":
        write_atomic(path, to_svg(figure))
        return
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=dpi)
    write_atomic(path, buffer.getvalue())
