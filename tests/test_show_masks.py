"""`ecg-jax show-masks`: the picture shows the masks of training. How it looks was judged by eye."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import cli, show_masks
from ecg_jax.config_flags import load_config
from ecg_jax.data.pipeline import train_batches
from ecg_jax.data.selection import select_records
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.objectives.masking import STRATEGIES, Masking
from ecg_jax.run_setup import build_objective, build_optimiser, build_teacher, initial_state, open_store
from ecg_jax.training.train_state import train_step

SAMPLES, LEADS = 600, 12


def _config(store, spec="configs/data2vec.py", **fields):
    config = load_config(spec)
    config.update_from_flattened_dict({"store": str(store), "batch_size": 8, **fields})
    return config


def _masks(masking, records, seed=0):
    index = np.arange(records, dtype=np.int32)
    return show_masks.masks_of_step(masking, index, seed=seed, step=0, samples=SAMPLES, leads=LEADS)


def _crops(records):
    signal = np.random.default_rng(0).normal(0, 0.3, (records, SAMPLES, LEADS)).astype(np.float32)
    names = [f"r{i}" for i in range(records)]
    leads = tuple(f"lead {c}" for c in range(LEADS))
    return show_masks.Crops(signal, np.arange(records, dtype=np.int32), names, leads, 240.0, "made")


def test_masks_are_those_of_training(synthetic_store, monkeypatch):
    """A training step at the same seed and step number draws the masks that the picture shows."""
    small = {"model.width": 8, "model.state": 4, "model.layers": 1, "objective.head_state": 4, "seed": 5}
    config = _config(synthetic_store, "configs/jepa.py", **small)
    _, preprocessing = open_store(config)
    _, tx = build_optimiser(config, 10)
    teacher = build_teacher(config, 10)
    state = initial_state(config, tx, preprocessing, teacher).replace(step=jnp.array(3))
    drawn = []
    draw = Masking.draw

    def recording(self, key, record_index, **window):
        mask = draw(self, key, record_index, **window)
        jax.debug.callback(lambda hidden, targets: drawn.append((hidden, targets)), mask.hidden, mask.targets)
        return mask

    monkeypatch.setattr(Masking, "draw", recording)
    step = functools.partial(
        train_step,
        model=build_objective(config, None),
        tx=tx,
        normalisation="none",
        kept_leads=ALL_LEADS,
        teacher=teacher,
        axis_name=None,
    )
    index = np.array([0, 4, 1], np.int32)
    signal = np.random.default_rng(0).integers(-900, 900, (3, SAMPLES, LEADS)).astype(np.int16)
    jax.block_until_ready(jax.jit(step)(state, {"signal": signal, "record_index": index}))
    jax.effects_barrier()
    monkeypatch.undo()
    masking = Masking(**config.objective.mask.to_dict())
    expected = show_masks.masks_of_step(masking, index, seed=5, step=3, samples=SAMPLES, leads=LEADS)
    assert drawn
    for hidden, targets in drawn:
        np.testing.assert_array_equal(hidden, expected.hidden)
        np.testing.assert_array_equal(targets, expected.targets)


def test_crops_are_those_of_training(synthetic_store):
    config = _config(synthetic_store)
    crops = show_masks.first_crops(config, seed=3, records=5)
    store, preprocessing = open_store(config)
    rows = select_records(store, window_samples=SAMPLES, val_folds=1, max_records=18000).train
    batches = train_batches(store, rows, batch_size=8, window_samples=preprocessing.window_samples, seed=3)
    batch = next(batches)
    batches.close()
    np.testing.assert_allclose(crops.signal, batch["signal"][:5] / 1000, atol=1e-6)
    np.testing.assert_array_equal(crops.record_index, np.arange(5))
    assert crops.names == [str(store.column("record_id")[row]) for row in batch["row"][:5]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_picture_shows_the_mask(strategy):
    mask = _masks(Masking(strategy=strategy), 3)
    figure = show_masks.draw_masks(_crops(3), mask, title="t")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 3
    for record, axes in enumerate(panels):
        cells, strip = (np.asarray(image.get_array()) for image in axes.images)
        assert cells.shape == (LEADS, SAMPLES)
        assert strip.shape == (1, SAMPLES)
        np.testing.assert_array_equal(strip[0, ::2], mask.targets[record])
        np.testing.assert_array_equal(strip[0, 1::2], mask.targets[record])
        shaded = cells != show_masks.SEEN
        own = show_masks.shares(jax.tree.map(lambda a, b=record: a[b : b + 1], mask))
        assert shaded.mean() == pytest.approx(own.hidden)
        if mask.signal is None:
            assert (shaded == shaded[:1]).all()
            np.testing.assert_array_equal(shaded[0, ::2], mask.hidden[record])
        else:
            np.testing.assert_array_equal(shaded.T, mask.signal[record])
        predicted = np.repeat(mask.targets[record] > 0, 2)
        np.testing.assert_array_equal(cells == show_masks.PREDICTED, shaded & predicted)
        # Black traces are drawn exactly where the model sees: two lines for each lead, then the scale.
        lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == SAMPLES]
        assert len(lines) == 2 * LEADS
        np.testing.assert_array_equal(~np.isnan(lines[1::2]), ~shaded)
        assert f"{100 * own.hidden:.1f} %" in axes.get_title(loc="left")
        assert f"{100 * own.predicted:.1f} % of tokens predicted" in axes.get_title(loc="left")


def test_the_scale_is_one_millivolt():
    """The bar beside the lowest lead is as long as a step of 1 mV in a trace."""
    crops = _crops(1)
    signal = np.zeros_like(crops.signal)
    signal[:, 300:310, 0] = 1.0
    figure = show_masks.draw_masks(crops._replace(signal=signal), _masks(Masking(), 1), title="t")
    lines = [np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines]
    trace = next(line for line in lines if len(line) == SAMPLES)
    bar = next(line for line in lines if len(line) == 2)
    assert np.ptp(bar) == pytest.approx(np.ptp(trace))


def test_legend_tells_context_from_targets():
    crops = _crops(2)
    mask = _masks(Masking(strategy="block", context_min=0.85, context_max=0.85), 2)
    figure = show_masks.draw_masks(crops, mask, title="t", blocks=True)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == ["context (seen)", "targets (hidden, to be predicted)", "neither (hidden)"]
    assert len(texts) == 3 + mask.targets.max()


def test_mean_shares():
    found = show_masks.mean_shares(Masking(), seed=0, samples=SAMPLES, leads=LEADS)
    assert found.hidden == pytest.approx(0.49, abs=0.015)
    assert found.predicted == found.hidden
    exact = show_masks.mean_shares(
        Masking(strategy="lead", ratio=0.25), seed=0, samples=SAMPLES, leads=LEADS, draws=9
    )
    assert exact == pytest.approx((0.25, 1.0))


def _run(output, *words, config="configs/data2vec.py"):
    return cli.main(["show-masks", f"--config={config}", f"--output={output}", *words])


def test_on_the_shipped_sample(tmp_path, capsys):
    from matplotlib.image import imread

    output = tmp_path / "masks.png"
    assert _run(output, "--records=2", config="configs/jepa.py") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{output}: block masks, mean of 1000 draws: 5")
    assert [path.name for path in tmp_path.iterdir()] == ["masks.png"]
    picture = imread(output)[..., :3]
    assert min(picture.shape[:2]) > 500
    # Orange targets, grey rest and white context all take up room.
    for colour in ("#F7C9A3", "#D3D6DA", "#FFFFFF"):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(picture - rgb).max(axis=2) < 0.01).mean() > 0.01


def test_same_seed_same_picture(synthetic_store, tmp_path):
    def picture(name, *words):
        path = tmp_path / name
        assert _run(path, f"--config.store={synthetic_store}", "--records=1", *words) == 0
        return path.read_bytes()

    first = picture("a.png")
    assert picture("b.png", "--seed=0") == first
    assert picture("c.png", "--seed=1") == picture("d.png", "--config.seed=1") != first


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_other_formats(synthetic_store, tmp_path, suffix, begins):
    path = tmp_path / f"masks{suffix}"
    assert _run(path, f"--config.store={synthetic_store}", "--records=1") == 0
    assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output=masks.gif"], "--output=masks.gif must end in .png, .svg or .pdf"),
        (["--output=nowhere/masks.png"], "--output=nowhere/masks.png: there is no folder nowhere"),
        (["--config=configs/cpc.py"], "the objective cpc hides nothing"),
        (["--records=0"], "--records=0 must lie between 1 and 16"),
        (["--records=9", "--config.batch_size=8"], "--records=9 must lie between 1 and 8"),
        (["--seed=-1"], "--seed=-1 must be at least 0"),
        (["--config.objective.mask.strategy=spam"], "config.objective.mask.strategy='spam' is unknown; known: span"),
        (["--config.objective.mask.span=301"], "config.objective.mask.span=301 must lie between 1 and 300"),
        (["--config.data.window_s=0"], "config.data.window_s=0.0 must be positive"),
        (["--config.data.window_s=1e3"], "leaves no recording to train on"),
        (["--config.store=nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_refusals(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = {"--config": "configs/data2vec.py", "--output": "masks.png"}
    for word in list(words):
        name, _, value = word.partition("=")
        if name in arguments:
            arguments[name] = value
            words = [other for other in words if other != word]
    assert cli.main(["show-masks", *(f"{name}={value}" for name, value in arguments.items()), *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_cpc_is_told_what_it_is_for(tmp_path, capsys):
    assert _run(tmp_path / "masks.png", config="configs/cpc.py") == 2
    error = capsys.readouterr().err
    assert "show-masks is for the masked objectives: jepa, data2vec, dinosr, hubertpp, hubert" in error


def test_help_names_the_command(capsys):
    assert cli.main(["--help"]) == 0
    assert "show-masks" in capsys.readouterr().out
