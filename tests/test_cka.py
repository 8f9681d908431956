"""CKA against its textbook form, the estimator's definition, and populations whose CKA is known."""

import itertools

import jax
import numpy as np
import pytest

from ecg_jax.studies import cka
from ecg_jax.studies.cka import HsicSums, batches_of, groups_of, linear_cka


def textbook_hsic(x, y):
    """HSIC₁ from n x n kernels, Song et al. 2012, equation 5."""
    n = len(x)
    k, h = (np.asarray(z, np.float64) @ np.asarray(z, np.float64).T for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(h, 0)
    one = np.ones(n)
    terms = np.trace(k @ h) + (one @ k @ one) * (one @ h @ one) / ((n - 1) * (n - 2))
    return (terms - 2 / (n - 2) * one @ k @ h @ one) / (n * (n - 3))


def biased_hsic(x, y):
    """Trace of centred kernels, Gretton et al. 2005."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, h = (centre @ z @ z.T @ centre for z in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    return np.trace(k @ h) / (n - 1) ** 2


def textbook_cka(layers, hsic=textbook_hsic):
    h = np.array([[hsic(x, y) for x in layers] for y in layers])
    return h / np.sqrt(np.outer(np.diagonal(h), np.diagonal(h)))


def related(n, widths=(7, 20, 7), seed=0):
    """Layers of a common origin, of several widths, with offsets."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 12))
    return [
        (z @ rng.normal(size=(12, d)) + rng.normal(size=(n, d)) + 3 * rng.normal(size=d)).astype(np.float32)
        for d in widths
    ]


@pytest.mark.parametrize("form", ["gram", "features"])
@pytest.mark.parametrize("n", [6, 45])
def test_equals_the_textbook(n, form):
    layers = related(n)
    found = linear_cka(layers, form=form)
    np.testing.assert_allclose(found.debiased, textbook_cka(layers), atol=2e-5)
    np.testing.assert_allclose(found.biased, textbook_cka(layers, biased_hsic), atol=2e-5)
    np.testing.assert_array_equal(found.debiased, found.debiased.T)
    np.testing.assert_allclose(np.diagonal(found.debiased), 1, atol=1e-12)
    assert (found.n_examples, found.n_batches) == (n, 1)


def test_rows_of_kernels_in_blocks(monkeypatch):
    layers = related(45)
    monkeypatch.setattr(cka, "_BLOCK", 3 * 45 * 11)  # blocks of 11 rows, the last is padded
    cka._sums.clear_cache()
    np.testing.assert_allclose(linear_cka(layers, form="gram").debiased, textbook_cka(layers), atol=1e-6)
    cka._sums.clear_cache()


@pytest.mark.parametrize("seed", range(3))
def test_rotation_scale_and_translation_change_nothing_and_other_maps_do(seed):
    rng = np.random.default_rng(seed)
    x, y = related(60, widths=(16, 16), seed=seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    moved = (10 ** rng.uniform(-3, 3) * (x @ rotation) + rng.normal(scale=30, size=16)).astype(np.float32)
    stretched = (x @ np.diag(np.logspace(0, 1.5, 16))).astype(np.float32)
    found = linear_cka([x, moved, stretched, y]).debiased
    assert found[0, 1] == pytest.approx(1, abs=1e-4)
    assert found[1, 3] == pytest.approx(found[0, 3], abs=1e-3)
    assert found[0, 2] < 0.9
    assert abs(found[2, 3] - found[0, 3]) > 0.03


def test_independent_layers_are_near_zero_debiased_only():
    """With fewer examples than features the biased estimator is far from the truth, 0."""
    rng = np.random.default_rng(0)
    found = linear_cka([rng.normal(size=(40, 128)), rng.normal(size=(40, 128))])
    assert abs(found.debiased[0, 1]) < 0.05
    assert found.low[0, 1] < 0 < found.high[0, 1]
    assert found.biased[0, 1] > 0.6
    assert found.effective_dimensions == pytest.approx([128, 128], rel=0.15)


def test_average_over_all_mini_batches_is_the_estimate_of_all():
    """HSIC₁ is a U-statistic: its mean over all subsets of a size is its value on everything, which is why mini-batches
    do. The biased one's is not.
    """
    layers = related(8, widths=(3, 5))
    sums = HsicSums(groups=0)
    for subset in itertools.combinations(range(8), 6):
        sums.add([x[list(subset)] for x in layers])
    full = HsicSums(groups=0)
    full.add(layers)
    expected = [[textbook_hsic(x, y) for x in layers] for y in layers]
    np.testing.assert_allclose(full.hsic(), expected, rtol=1e-4)
    np.testing.assert_allclose(sums.hsic(), expected, rtol=1e-4)
    assert np.abs(sums.result().biased[0, 1] - full.result().biased[0, 1]) > 0.01
    assert np.isnan(sums.result().low).all()


def test_mini_batches_average_hsic_before_the_quotient():
    layers = related(47, widths=(7, 20))
    pieces = batches_of(47, 10)
    assert [len(piece) for piece in pieces] == [12, 12, 12, 11]
    h = np.mean([[[textbook_hsic(x[p], y[p]) for x in layers] for y in layers] for p in pieces], axis=0)
    found = linear_cka(layers, batch=10)
    assert found.n_batches == 4
    np.testing.assert_allclose(found.debiased[0, 1], h[0, 1] / np.sqrt(h[0, 0] * h[1, 1]), atol=1e-6)
    whole = linear_cka(layers, batch=47)
    np.testing.assert_array_equal(whole.debiased, linear_cka(layers).debiased)


def test_interval_is_that_of_leaving_each_group_out():
    from scipy import stats

    layers = related(20, widths=(5, 9))
    left_out = [textbook_cka([np.delete(x, i, axis=0) for x in layers])[0, 1] for i in range(20)]
    z = np.arctanh(left_out)
    error = np.sqrt(19 / 20 * ((z - z.mean()) ** 2).sum())
    centre = np.arctanh(textbook_cka(layers)[0, 1])
    expected = np.tanh(centre + stats.t.ppf([0.05, 0.95], 19) * error)
    found = linear_cka(layers, level=0.9)
    np.testing.assert_allclose([found.low[0, 1], found.high[0, 1]], expected, atol=1e-4)
    assert found.low[0, 0] == found.high[0, 0] == 1
    assert (groups_of(45) == np.arange(45) % 20).all()


@pytest.mark.parametrize("batch", [None, 25])
def test_intervals_cover_the_population(batch):
    """Of normal features the population's CKA follows from their covariances."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 24, 12)) * np.logspace(0, -1.5, 24)[:, None]
    maps[1] = 0.6 * maps[0] + 0.8 * maps[1]
    cross = np.array([[((a.T @ b) ** 2).sum() for a in maps] for b in maps])
    truth = cross[0, 1] / np.sqrt(cross[0, 0] * cross[1, 1])
    covered, points = [], []
    for _ in range(100):
        z = rng.normal(size=(75, 24))
        found = linear_cka([z @ a for a in maps], batch)
        covered.append(found.low[0, 1] <= truth <= found.high[0, 1])
        points.append(found.debiased[0, 1])
    assert 0.2 < truth < 0.8
    assert 0.88 <= np.mean(covered) <= 1
    assert abs(np.mean(points) - truth) < 4 * np.std(points) / 10


def test_a_layer_that_is_the_same_for_all_examples_has_no_cka():
    (x,) = related(30, widths=(6,))
    constant = np.full((30, 6), 0.1, np.float32)
    found = linear_cka([x, constant])
    assert np.isnan(found.debiased[1]).all()
    assert np.isnan(found.low[0, 1])
    assert found.debiased[0, 0] == 1
    assert np.isnan(found.effective_dimensions[1])


def test_share_of_an_outlier():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 5)).astype(np.float32)
    x[3] = 30
    centred = x - x.mean(axis=0)
    expected = (centred[3] ** 2).sum() / (centred**2).sum()
    assert linear_cka([x, x]).largest_share == pytest.approx(expected, rel=1e-4)


def largest(jaxpr):
    """Elements of the largest array that a traced program makes."""
    sizes = [0]
    for step in jaxpr.eqns:
        sizes += [variable.aval.size for variable in step.outvars]
        for value in jax.tree.leaves(list(step.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)


@pytest.mark.parametrize("form", ["gram", "features"])
def test_no_n_by_n_matrix(form, monkeypatch):
    """Of 65 536 examples a kernel would have 4.3 billion numbers; nothing is computed here."""
    n = 2**16
    layers = tuple(jax.ShapeDtypeStruct((n, 8), np.float32) for _ in range(3))

    def of_program():
        cka._sums.clear_cache()
        return largest(cka._sums.trace(layers, jax.ShapeDtypeStruct((2, n), np.float32), form=form).jaxpr)

    assert of_program() <= 2**25
    monkeypatch.setattr(cka, "_BLOCK", 3 * n * n)
    assert (of_program() == 3 * n * n) is (form == "gram")  # were it not for the blocks
    cka._sums.clear_cache()


def test_memory_does_not_grow_with_mini_batches():
    sums, layers = HsicSums(groups=5), related(20, widths=(4, 6))

    def held():
        return sum(np.asarray(value).nbytes for value in vars(sums).values() if not isinstance(value, str))

    sums.add(layers, groups_of(20) % 5)
    first = held()
    for _ in range(5):
        sums.add(layers, groups_of(20) % 5)
    assert held() == first
    assert sums.n_examples == 120


def test_refusals():
    layers = related(4, widths=(3,))
    with pytest.raises(ValueError, match="at least 4 examples in a mini-batch, not 3"):
        HsicSums(groups=0).add([x[:3] for x in layers])
    with pytest.raises(ValueError, match="needs 5 examples in a mini-batch, not 4"):
        linear_cka(layers)
    with pytest.raises(ValueError, match="different numbers"):
        linear_cka([np.zeros((6, 2)), np.zeros((7, 2))])
    with pytest.raises(ValueError, match="no mini-batch of 9"):
        batches_of(8, 9)
