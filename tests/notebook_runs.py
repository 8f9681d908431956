"""Runs a notebook as its readers do, cut down, and brings back what its variables hold."""

import json
import runpy
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
_run = runpy.run_path(str(NOTEBOOKS / "execute.py"))["run"]


def run_quickly(name: str, folder: Path, variables: str) -> tuple[dict[str, Any], int]:
    """Runs a notebook in its quick setting in a fresh kernel.

    Args:
        name: of the file.
        folder: an empty one, for what the kernel writes.
        variables: names, separated by blanks, of what JSON can hold.

    Returns:
        (name -> value of each variable, number of pictures).

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    wanted = ", ".join(f"{each!r}: {each}" for each in variables.split())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n\nprint(json.dumps({{{wanted}}}))"))
    _run(notebook, folder, ECG_JAX_NOTEBOOK="quick")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = sum("image/png" in output["data"] for output in outputs if "data" in output)
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    return json.loads(outputs[-1].text), pictures
