"""Pictures of a report: an image for the page, the same as files, its data, and what it says and does not say."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ecg_jax.evaluation.drawing import to_svg
from ecg_jax.studies.figure_folder import SVG_WIDTH, Value, data_csv

_DPI = 150
# A larger SVG goes onto the page as PNG, where that is smaller.
_LARGE_SVG = 250_000


@dataclass(frozen=True)
class Picture:
    """An image with what it shows in words, and the files that go beside the page."""

    name: str
    """Of its files."""
    data: bytes
    kind: str
    """"svg+xml" or "png"."""
    alt: str
    caption: str
    """What is drawn."""
    width: int
    """Pixels at its natural size."""
    shows: str = ""
    """What can be read from it; empty for a recording, which speaks for itself."""
    does_not_show: str = ""
    """What must not be read from it."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Suffix -> content: ".svg", ".png", ".csv"."""


def drawn(
    figure,
    name: str,
    *,
    alt: str,
    caption: str,
    shows: str,
    does_not_show: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Value]],
) -> Picture:
    """A matplotlib Figure as a picture of the page, with its files.

    Args:
        figure: drawn.
        name: of its files; figures of a page and its tables share one folder.
        alt, caption, shows, does_not_show: see `Picture`.
        columns, rows: every number that is drawn.

    Raises:
        ValueError: a row does not fit the columns.
    """
    # Laid out once for both files: that is most of the time a picture takes.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    svg, png = to_svg(figure), io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI)
    files = {".svg": svg, ".png": png.getvalue(), ".csv": data_csv(columns, rows)}
    return of_files(name, files, alt=alt, caption=caption, shows=shows, does_not_show=does_not_show)


def of_files(name: str, files: Mapping[str, bytes], **words: str) -> Picture:
    """A picture of files that are there: the page shows the SVG, or the PNG where that is much smaller."""
    points = float(SVG_WIDTH.search(files[".svg"])[1])
    large = len(files[".svg"]) > _LARGE_SVG and len(files[".png"]) < len(files[".svg"])
    kind = "png" if large else "svg+xml"
    return Picture(
        name=name,
        data=files[".png" if large else ".svg"],
        kind=kind,
        width=round(points * 4 / 3),
        files=files,
        **words,
    )
