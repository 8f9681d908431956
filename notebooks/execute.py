"""Runs notebooks from their first cell to their last and keeps what they print and draw.

    python notebooks/execute.py                          all of them, a few minutes each
    ECG_JAX_NOTEBOOK=quick python notebooks/execute.py --check     cut down; the files stay as they are

The second is what CI does with each of them. Needs `pip install -e ".[notebooks]"`.
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent

#: One CPU device, as a reader's laptop has, and sums of linear algebra in one order: the same numbers each time.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "OPENBLAS_NUM_THREADS": "1"}


def run(notebook, folder: str | Path, timeout: float = 1800.0, **environment: str):
    """Runs all cells of a notebook in a fresh kernel.

    Args:
        notebook: from `nbformat.read`; its outputs are replaced.
        folder: where the kernel starts and keeps what it caches.
        timeout: seconds for one cell.
        environment: variables of the kernel, beside this process's.

    Returns:
        The same notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    env = {**os.environ, **ENVIRONMENT, "XDG_CACHE_HOME": str(folder), **environment}
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env=env)
    # Which Python and which folder ran it is nobody's business but changes every file.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    """Runs the notebooks named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="files (default: all beside this one)")
    parser.add_argument("--check", action="store_true", help="run only, write nothing")
    options = parser.parse_args()
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, folder)
        if not options.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
