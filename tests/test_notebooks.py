"""The notebooks on data and S4 run from first cell to last and show what they say; all are committed as they ran."""

import re

import nbformat
import pytest

from notebook_runs import NOTEBOOKS, run_quickly

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
MOST_BYTES = 1_500_000


def test_data(tmp_path):
    found, pictures = run_quickly(
        "01_data.ipynb",
        tmp_path,
        "order_repeats order_resumes seeds_differ processes_agree epoch_is_permutation refused silent rates_differ "
        "alias_ratio shared_patients residual_of_arms",
    )
    assert pictures >= 10
    claims = ("order_repeats", "order_resumes", "seeds_differ", "processes_agree", "epoch_is_permutation")
    assert [name for name in claims if not found[name]] == []
    assert found["refused"] == ["normed", "volts"]
    assert found["silent"] == ["arms", "clean", "half"]
    assert max(found["rates_differ"].values()) < 10  # microvolts
    assert found["alias_ratio"] > 10  # the hum is there after careless decimation only
    assert found["shared_patients"] == 1
    assert found["residual_of_arms"] < 0.05  # mV: what Einthoven's laws cannot see


def test_s4(tmp_path):
    found, pictures = run_quickly(
        "02_s4.ipynb", tmp_path, "errors kernels_differ hippo_error skewness lost causal_leak"
    )
    assert pictures >= 7
    assert set(found["errors"]) == {"fft", "toeplitz", "chunked:64"}
    assert max(found["errors"].values()) < 1e-5  # against the recurrence
    assert found["kernels_differ"] < 1e-5
    assert found["hippo_error"] < 0.02
    assert found["skewness"] < 1e-12
    lost = [sum(found["lost"][N]) for N in ("8", "32", "128")]
    assert lost == sorted(lost, reverse=True)  # more states remember more
    assert found["causal_leak"] < 1e-6


def test_there_are_four_notebooks():
    names = [path.name for path in FILES]
    assert names == ["01_data.ipynb", "02_s4.ipynb", "03_pretrain_and_probe.ipynb", "04_scaling_study.ipynb"]


def test_the_shipped_report_has_its_files_beside_it():
    """Each link leads somewhere, nothing lies there that the page does not link to, and no path is of a machine."""
    page, folder = NOTEBOOKS / "mini_study.html", NOTEBOOKS / "mini_study_tables"
    text = page.read_text(encoding="utf-8")
    links = {link for link in re.findall(r'href="([^"#][^"]*)"', text)}
    assert links == {f"{folder.name}/{path.name}" for path in folder.iterdir()} - {f"{folder.name}/index.csv"}
    assert len(links) > 80
    assert "45 runs, 45 finished, of 5 objectives on 3 backbones" in text
    assert "with changes" not in text, "made of a checkout as it was committed"
    for path in (page, *folder.iterdir()):
        found = re.search(
            r"(?<![\w.:/\"])/(tmp|home|root|work|usr|var|Users)\b", path.read_text(encoding="utf-8")
        )
        assert not found, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
class TestAsCommitted:
    def test_is_a_notebook_that_ran_from_a_fresh_kernel(self, path):
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell.outputs]
        kinds = {output.output_type for output in outputs}
        assert "error" not in kinds
        assert not [output.text for output in outputs if output.get("name") == "stderr"]
        assert sum("image/png" in output["data"] for output in outputs if "data" in output) >= 6
        # Every code cell but the settings, imports, definitions and the last says or draws something.
        assert sum(bool(cell.outputs) for cell in code) >= len(code) - 5
        assert path.stat().st_size < MOST_BYTES

    def test_says_nothing_about_whose_machine_it_was(self, path):
        notebook = nbformat.read(path, as_version=4)
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert not any("execution" in cell.metadata for cell in notebook.cells)
        for cell in notebook.cells:
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                texts = [text for kind, text in data.items() if not kind.startswith("image/")]
                for text in [output.get("text", ""), *texts]:
                    found = re.search(
                        r"(?<![\w.:/])/(tmp|home|root|work|usr|var|Users)\b|it/s|windows/s|Warning", text
                    )
                    assert not found, (cell.id, text)

    def test_takes_its_sizes_from_the_first_cell(self, path):
        assert "ECG_JAX_NOTEBOOK" in nbformat.read(path, as_version=4).cells[1].source
        assert path.read_text().count("ECG_JAX_NOTEBOOK") == 1
