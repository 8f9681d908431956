"""`ecg-jax quickstart`: prepare, pretrain and probe on the PTB-XL sample that ships with the package."""

import argparse
from pathlib import Path

from ecg_jax.config_flags import load_config, parse_command
from ecg_jax.data.store import Store
from ecg_jax.evaluation import plots
from ecg_jax.prepare import prepare
from ecg_jax.pretrain import pretrain
from ecg_jax.probe import probe, summary

SAMPLE = Path(__file__).parent / "assets" / "ptbxl_sample"
TASK = "ptbxl_super"

DESCRIPTION = """\
The whole way once, on 304 real recordings of PTB-XL that ship with the package: raw files -> store -> CPC
pretraining of a small S4 encoder -> linear probe of the five diagnostic superclasses, beside the same probe
on a randomly initialised encoder and the majority guess. Two to three minutes on two cores. Run it again after an
interruption: it continues where it was.
"""


def quickstart(config, workdir: str | Path) -> dict:
    """Runs the three stages and draws three pictures.

    Writes `store/`, `run/`, `probe/`, `ecg.png` and `loss.png` into the workdir.

    Args:
        config: of the pretraining run, see `configs/quickstart.py`; its store is set here.
        workdir: created if needed.

    Returns:
        The probe's results.

    Raises:
        UserError: the workdir holds something else.
    """
    workdir = Path(workdir)
    store, run = workdir / "store", workdir / "run"

    print(f"1. Prepare: {SAMPLE.name} -> {store}", flush=True)
    print(prepare("ptbxl", SAMPLE, store))
    draw_ecg(Store(store), workdir / "ecg.png")

    print(f"\n2. Pretrain: {store} -> {run}", flush=True)
    config.store = str(store)
    pretrain(config, run)
    plots.loss_curve(run / "log.jsonl", workdir / "loss.png", title="CPC on the PTB-XL sample")

    print(f"\n3. Probe: {run} -> {workdir / 'probe'}", flush=True)
    results = probe(load_config(f"configs/probe.py:mode=linear,task={TASK}"), workdir / "probe", run, store)
    print(f"\n{summary(results)}")
    return results


def draw_ecg(store: Store, path: Path) -> None:
    """The first recording of a store on ECG paper."""
    record = store.column("record_id")[0]
    plots.ecg_paper(
        store.read(0) / 1000, store.rate_hz, store.leads, path, title=f"{store.corpus} record {record}"
    )


def main(argv: list[str]) -> int:
    """`ecg-jax quickstart`."""

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--workdir",
            default="runs/quickstart",
            metavar="DIR",
            help="folder for all results (default: %(default)s)",
        )

    config, args = parse_command(
        "quickstart",
        DESCRIPTION,
        argv,
        options,
        like="configs/cpc.py",
        default_config="configs/quickstart.py",
    )
    quickstart(config, args.workdir)
    workdir = Path(args.workdir)
    print(f"""
pictures   {workdir / "ecg.png"}              one recording on ECG paper
           {workdir / "loss.png"}             the loss of pretraining
           {workdir / "probe" / "per_class_auroc.png"}  AUROC of each class with its interval

Next, embed recordings with the encoder you just pretrained:
  ecg-jax embed --checkpoint={workdir / "run"} --input={SAMPLE / "records100"} --output={workdir / "embeddings.npz"}""")
    return 0
