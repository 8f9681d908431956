"""`ecg-jax report`: a study, or finished probes side by side with their baselines, as one page, tables and figures."""

import argparse
import contextlib
import csv
import datetime
import io
import os
from collections.abc import Sequence
from pathlib import Path

from ecg_jax.errors import UserError
from ecg_jax.studies.report import export, html, load, rows
from ecg_jax.studies.report import recordings as recordings_shown
from ecg_jax.studies.report.kinds import is_study
from ecg_jax.studies.report.page import GENERATOR, SUFFIXES, TABLE_SUFFIXES, Beside, Page

DESCRIPTION = """\
Puts what was done onto one self-contained page, with its tables as CSV and LaTeX and its figures as PNG, SVG and CSV in
a folder beside it. What the page holds depends on the folders given, of any kinds together:

  a sweep           every run with its config, cost and losses, every probe with intervals and ranks, and the
                    figures in its studies/
  a pretraining run the same of one run
  figures           of `ecg-jax scaling`, `cka` or `efficiency` (a folder with figures.json), as they were drawn
  a probe           its scores; of one task or of task=all, with a robustness.json or label_efficiency.json in it

  ecg-jax report sweeps/mini_study --output=study.html
  ecg-jax report sweeps/mini_study studies/efficiency --output=study.html
  ecg-jax report probes/cpc_linear probes/jepa_linear probes/s4_supervised --output=probes.html

Where all folders are probes, every task needs its baselines: a randomly initialised encoder, ECG features and the
majority guess, which come with a probe, and an encoder trained from scratch (mode=supervised) among the folders. The
page of a study says in a box what is missing.
"""
INDEX = "index.csv"
_HEAD = ("name", "kind", "caption")
# By which the folder of a report is known, older ones too.
_HEADS = (_HEAD, ("table", "caption"))
TITLE = "ECG encoders compared"
FILES = tuple(suffix[1:] for suffix in SUFFIXES)


def report(
    workdirs: list[str | Path],
    output: str | Path,
    title: str,
    recordings: str = "open",
    files: Sequence[str] = FILES,
) -> list[Path]:
    """Writes a report.

    Args:
        workdirs: of sweeps, pretraining runs, figures of a study, or finished probes.
        output: the page, an .html file; its tables and figures go to <name>_tables beside it.
        title: of the page.
        recordings: which to draw: "open" for those of corpora that may be passed on, "all", "none".
        files: which of `FILES` go beside the page; it links to no others.

    Returns:
        The files written, the page first.

    Raises:
        UserError: folders that are damaged, or an output that cannot be written; of probes alone also such that are
            partial, do not belong together or lack a baseline. Nothing is written then.
    """
    output = Path(output)
    _check_output(output)
    options = (f"--output={output}", f"--title={title}", f"--recordings={recordings}")
    command = ["ecg-jax", "report", *map(str, workdirs), *options]
    if tuple(files) != FILES:
        command.append(f"--files={','.join(files)}")
    now = datetime.datetime.now(datetime.UTC)
    beside = Beside(_tables_folder(output).name, [f".{name}" for name in files])

    def say(task: str) -> None:
        print(f"  {task}", flush=True)

    if any(is_study(Path(workdir)) for workdir in workdirs):
        page = _study_page(workdirs, title, now, command, recordings, beside, say)
    else:
        collection = load.load(workdirs)
        rows.check_baselines(collection)
        scores = rows.score_tasks(collection, say)
        page = html.build(title, collection, scores, now, command, recordings, beside)
    try:
        content, files = page.html().encode(), _files(page)
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 40) : error.end]
        raise UserError(
            f"A name among the folders is not UTF-8, at the end of {near!r}; rename it."
        ) from error
    return _write(output, content, files)


def _study_page(workdirs, title, now, command, recordings, beside, say) -> Page:
    # Configs and formulas of runs need JAX, which probes alone do not.
    from ecg_jax.studies.report import boards, study, study_page

    found = study.gather(workdirs)
    made = boards.make_boards(found, say)
    return study_page.build(title, found, made, now, command, recordings, beside)


def _files(page: Page) -> dict[str, bytes]:
    """What lies beside the page: tables as CSV and LaTeX, figures as pictures and CSV, and a list of them."""
    index = io.StringIO()
    lines = csv.writer(index, lineterminator="\n")
    lines.writerow(_HEAD)
    files: dict[str, bytes] = {}
    written = page.beside.suffixes
    for table in page.tables:
        lines.writerow((table.name, "table", table.caption))
        for suffix, export_as in zip(TABLE_SUFFIXES, (export.to_csv, export.to_latex), strict=True):
            if suffix in written:
                files[f"{table.name}{suffix}"] = export_as(table).encode()
    for picture in page.pictures:
        lines.writerow((picture.name, "figure", picture.caption))
        own = {f"{picture.name}{suffix}": data for suffix, data in picture.files.items() if suffix in written}
        files |= own
    return files | {INDEX: index.getvalue().encode()}


def _tables_folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}_tables")


def _check_output(output: Path) -> None:
    """Refuses, before any work, an output that cannot or should not be written."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output={output} must end in .html.")
    folder = _tables_folder(output)
    try:
        if not output.parent.is_dir():
            raise UserError(f"--output={output}: there is no folder {output.parent}; make it first.")
        if output.is_dir():
            raise UserError(f"--output={output} is a folder; name a file.")
        if output.exists() and GENERATOR.encode() not in output.read_bytes()[:2000]:
            raise UserError(f"--output={output} is there already and no report; choose another name.")
        theirs = folder.exists() and _indexed(folder) is None
    except OSError as error:
        raise UserError(
            f"--output={output} cannot be used: {error.strerror}; choose another name."
        ) from error
    if theirs:
        raise UserError(f"{folder}, where the tables go, is there already and not of a report; move it away.")


def _write(output: Path, page: bytes, files: dict[str, bytes]) -> list[Path]:
    """Writes all files under temporary names first, then renames them: a failure leaves nothing new."""
    folder = _tables_folder(output)
    made = not folder.exists()
    targets = {folder / name: data for name, data in files.items()} | {output: page}
    # Names that are short where those of the files are as long as they may be.
    temporary = {path: path.with_name(f".{os.getpid()}-{i}.tmp") for i, path in enumerate(targets)}
    before = _indexed(folder) or set()
    try:
        folder.mkdir(exist_ok=True)
        for path, data in targets.items():
            with open(temporary[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in targets:
            temporary[path].replace(path)
        # Tables of the report before that this one has not.
        for path in before - set(targets):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or output}: {error.strerror}.") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):  # the first one is told
                path.unlink(missing_ok=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return [output, *sorted(set(targets) - {output})]


def _indexed(folder: Path) -> set[Path] | None:
    """Files that an earlier report wrote, by its index; None where there is no index of one."""
    try:
        with open(folder / INDEX, newline="", encoding="utf-8") as file:
            head, *lines = csv.reader(file)
        names = [line[0] for line in lines]
    except (OSError, ValueError, IndexError, csv.Error):
        return None
    if tuple(head) not in _HEADS:
        return None
    return {folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES if "/" not in name}


def _files_asked(text: str) -> tuple[str, ...]:
    """The value of --files, in the order of `FILES`."""
    asked = text.split(",")
    if unknown := [name for name in asked if name not in FILES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(FILES)}")
    return tuple(name for name in FILES if name in asked)


def main(argv: list[str]) -> int:
    """`ecg-jax report`."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="folder of a sweep, run, study or probe")
    parser.add_argument("--output", required=True, metavar="FILE.html", help="page to write")
    parser.add_argument("--title", default=TITLE, help="of the page (default: %(default)s)")
    parser.add_argument(
        "--recordings",
        choices=recordings_shown.RECORDINGS,
        default="open",
        help=f"whose to draw; open: not those of {' and '.join(recordings_shown.CLOSED)}, which must not be passed on "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--files",
        type=_files_asked,
        default=FILES,
        metavar="LIST",
        help=f"of {', '.join(FILES)}, joined by commas: as which tables (csv, tex) and figures (csv, png, svg) go "
        "beside the page (default: all)",
    )
    options = parser.parse_args(argv)
    written = report(options.workdirs, options.output, options.title, options.recordings, options.files)
    size = written[0].stat().st_size / 1e6
    print(f"{written[0]} ({size:.1f} MB), {len(written) - 1} files in {_tables_folder(written[0])}")
    return 0
