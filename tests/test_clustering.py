"""Codebooks, Sinkhorn targets, prototypes and k-means++: parity, statistics, and any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from conftest import assert_close, group, load_golden
from ecg_jax.models.layers import standardise
from ecg_jax.objectives import clustering
from ecg_jax.objectives.dinosr import dinosr_features


def test_codebook_updates_of_the_reference():
    golden = load_golden("dinosr")
    codebook, code_sum, code_count = (golden[f"in/{name}"] for name in ("codebook", "code_sum", "code_cnt"))
    for step, tokens in enumerate(golden["in/features"]):
        (features,) = dinosr_features([jnp.asarray(tokens)])
        labels = clustering.nearest_code(features, codebook)
        np.testing.assert_array_equal(labels, golden[f"step{step}/assignments"])
        codebook, code_sum, code_count = clustering.update_codebook(
            code_sum, code_count, features, labels, momentum=0.9, axis_name=None
        )
        assert_close(codebook, golden[f"step{step}/codebook"], 2e-6, "codebook")
        assert_close(code_sum, golden[f"step{step}/code_sum"], 2e-6, "code sum")
        assert_close(code_count, golden[f"step{step}/code_cnt"], 2e-6, "code count")


def test_a_dead_code_stays_then_shrinks_then_comes_back():
    golden = group(load_golden("dinosr"), "dead/")
    features = standardise(jnp.asarray(golden["in/features"]))[None]
    expected = golden["out/count_norm_hits"]

    def step(state, _):
        codebook, code_sum, code_count = state
        labels = clustering.nearest_code(features, codebook)
        hits = clustering.code_usage(labels, len(codebook), None)
        state = clustering.update_codebook(
            code_sum, code_count, features, labels, momentum=0.9, axis_name=None
        )
        return state, jnp.stack([state[2], jnp.linalg.norm(state[0], axis=-1), hits])

    start = tuple(
        jnp.asarray(golden[f"in/{name}"], jnp.float32) for name in ("codebook", "code_sum", "code_cnt")
    )
    _, history = jax.lax.scan(step, start, length=len(expected))
    history = np.asarray(history)  # [steps, (count, norm, hits), K]
    (dead,) = np.flatnonzero(history[0, 2] == expected[0, 2])
    np.testing.assert_array_equal(history[:, 2, dead], expected[:, 2])
    for column, name in enumerate(("count", "norm")):
        assert_close(history[:, column, dead], expected[:, column], 1e-4, name)
        # The measure above looks at the largest value; the small ones are what the clamp is about.
        np.testing.assert_allclose(history[:, column, dead], expected[:, column], rtol=1e-4)


@pytest.mark.parametrize("start", [0, 120])
def test_targets_and_prototypes_of_the_reference(start):
    golden = load_golden("hubertpp")
    prototypes = {j: golden[f"in/prototypes{j}"] for j in range(len(golden["meta/kmeans_ks"]))}
    for step, tokens in enumerate(golden["in/features"]):
        expected = group(golden, f"teacher/from{start}/step{step}/")
        features = clustering.unit_rows(tokens)
        temperature = clustering.temperature_at(start + step, start=0.15, end=0.07, steps=200)
        assert_close(temperature, expected["temperature"], 5e-6, "temperature")
        for j in prototypes:
            targets = clustering.sinkhorn_targets(
                clustering.cosines(features, prototypes[j]),
                temperature=temperature, rounds=3, axis_name=None,
            )  # fmt: skip
            assert_close(targets, expected[f"targets{j}"], 5e-6, f"targets {j}")
            prototypes[j] = clustering.update_prototypes(
                prototypes[j], targets, features, momentum=0.99, axis_name=None
            )
            assert_close(prototypes[j], expected[f"prototypes_after{j}"], 5e-6, f"prototypes {j}")


def test_temperatures_of_the_reference():
    golden = load_golden("hubertpp")
    for name, start, end in (("teacher", 0.15, 0.07), ("student", 0.5, 0.1)):
        expected = golden[f"schedule/{name}_temperature"]
        steps = jnp.arange(len(expected))
        actual = clustering.temperature_at(steps, start=start, end=end, steps=200)
        assert_close(actual, expected, 5e-6, name)
    constant = clustering.temperature_at(jnp.int32(0), start=0.5, end=0.1, steps=0)
    assert constant == pytest.approx(0.1)


def test_sinkhorn_balances_the_prototypes():
    """Tokens that all prefer one prototype are spread over all of them; without the columns they would not be."""
    similarity = jax.random.normal(jax.random.key(0), (2, 60, 8)) * 0.1 + jnp.eye(8)[0]
    targets = clustering.sinkhorn_targets(similarity, temperature=0.07, rounds=20, axis_name=None)
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(targets.sum((0, 1)), 120 / 8, rtol=0.02)


def test_nearest_code_is_the_nearest():
    rng = np.random.default_rng(0)
    features, codebook = rng.normal(size=(3, 50, 7)), rng.normal(size=(3, 11, 7))
    distances = np.square(features[:, :, None] - codebook[:, None]).sum(-1)
    np.testing.assert_array_equal(clustering.nearest_code(features, codebook), distances.argmin(-1))


def test_perplexity_counts_the_codes_in_use():
    usage = jnp.array([[5.0, 5.0, 5.0, 5.0], [7.0, 0.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0], [0.0] * 4])
    np.testing.assert_allclose(clustering.perplexity(usage), [4, 1, 2, 1], rtol=1e-6)


def test_kmeans_plus_plus_probabilities_of_the_reference():
    golden = group(load_golden("hubertpp"), "kmeanspp/")
    features = jnp.asarray(golden["in/features"], jnp.float32)
    nearest = jnp.full((1, len(features)), jnp.inf)
    for centre, expected in zip(golden["out/chosen"], golden["out/probabilities"], strict=False):
        nearest = jnp.minimum(nearest, clustering.squared_distance(features, features[centre]))
        probability = clustering.draw_probability(nearest, None)[0]
        assert_close(probability, expected, 5e-6, "probability")
        assert probability[centre] == 0
    chosen = features[golden["out/chosen"]]
    assert_close(clustering.unit_rows(chosen), golden["out/prototypes"], 5e-6, "prototypes")


def chosen_tokens(features, centres):
    """Number of the token that each centre is."""
    flat = np.asarray(features).reshape(-1, features.shape[-1])
    numbers = np.array([np.flatnonzero((flat == centre).all(-1)) for centre in np.asarray(centres)])
    assert numbers.shape == (len(centres), 1)
    return numbers[:, 0]


def test_kmeans_plus_plus_draws_with_its_probabilities():
    """The first centre is uniform and the second proportional to the squared distance, over many keys."""
    rng = np.random.default_rng(3)
    features = jnp.asarray(rng.normal(size=(2, 4, 3)) * rng.uniform(0.2, 3, size=(2, 4, 1)), jnp.float32)
    draws = 20_000
    draw = functools.partial(clustering.kmeans_plus_plus, codes=2, axis_name=None)
    centres = jax.jit(jax.vmap(draw, (0, None, None)))(
        jax.random.split(jax.random.key(1), draws), features, jnp.array([5, 2])
    )
    flat = np.asarray(features, np.float64).reshape(8, 3)
    first, second = (
        np.argmin(np.square(np.asarray(centres)[:, i, None] - flat).sum(-1), axis=-1) for i in range(2)
    )
    observed = np.zeros((8, 8))
    np.add.at(observed, (first, second), 1)
    distances = np.square(flat[:, None] - flat).sum(-1)
    expected = draws / 8 * distances / distances.sum(axis=1, keepdims=True)
    assert (np.diag(observed) == 0).all()
    off = ~np.eye(8, dtype=bool)
    chi_square = (np.square(observed - expected)[off] / expected[off]).sum()
    assert chi_square < 55 + 5 * (2 * 55) ** 0.5  # 56 cells, one constraint
    uniform = np.square(observed.sum(1) - draws / 8).sum() / (draws / 8)
    assert uniform < 7 + 5 * 14**0.5


def test_kmeans_plus_plus_finds_separate_groups():
    """Four tight groups far apart: every draw takes a centre from each."""
    rng = np.random.default_rng(0)
    places = np.array([[0, 0], [100, 0], [0, 100], [100, 100]])
    features = jnp.asarray(places[rng.integers(0, 4, (3, 40))] + rng.normal(size=(3, 40, 2)), jnp.float32)
    for seed in range(20):
        centres = clustering.kmeans_plus_plus(
            jax.random.key(seed), features, jnp.arange(3), codes=4, axis_name=None
        )
        chosen_tokens(features, centres)
        assert len({tuple(np.round(centre / 100).astype(int)) for centre in np.asarray(centres)}) == 4


def test_kmeans_plus_plus_with_fewer_distinct_tokens_than_codes():
    features = jnp.tile(jnp.array([[1.0, 2.0], [3.0, 4.0]]), (2, 5, 1))
    centres = clustering.kmeans_plus_plus(jax.random.key(0), features, jnp.arange(2), codes=5, axis_name=None)
    assert {tuple(centre) for centre in np.asarray(centres).tolist()} == {(1.0, 2.0), (3.0, 4.0)}


B, L, D, K = 16, 12, 6, 5


def every_reduction(features, record_index, codebook, *, axis_name):
    """Whatever sums over tokens, from one batch; all of it is the same on every device but `targets`."""
    labels = clustering.nearest_code(features, codebook)
    code_count = jnp.arange(1.0, K + 1)
    updated = clustering.update_codebook(
        codebook * code_count[:, None], code_count, features, labels, momentum=0.9, axis_name=axis_name
    )
    unit = clustering.unit_rows(features)
    targets = clustering.sinkhorn_targets(
        clustering.cosines(unit, clustering.unit_rows(codebook)),
        temperature=0.1, rounds=3, axis_name=axis_name,
    )  # fmt: skip
    prototypes = clustering.update_prototypes(
        clustering.unit_rows(codebook), targets, unit, momentum=0.9, axis_name=axis_name
    )
    usage = clustering.code_usage(labels, K, axis_name)
    centres = clustering.kmeans_plus_plus(
        jax.random.key(4), features, record_index, codes=9, axis_name=axis_name
    )
    return targets, (updated, prototypes, usage, clustering.perplexity(usage), centres)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(B, L, D)) + 2 * rng.normal(size=(B, 1, D))).astype(np.float32)
    return features, np.arange(B, dtype=np.int32), rng.normal(size=(K, D)).astype(np.float32)


@pytest.fixture(scope="module")
def one_device(batch):
    return jax.jit(functools.partial(every_reduction, axis_name=None))(*batch)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def shard_mapped(devices, batch):
    mapped = jax.shard_map(
        functools.partial(every_reduction, axis_name="data"),
        mesh=Mesh(np.asarray(jax.devices()[:devices]), ("data",)),
        in_specs=(P("data"), P("data"), P()),
        out_specs=(P("data"), P()),
        check_vma=True,
    )
    return jax.jit(mapped)(*batch)


@pytest.mark.parametrize("devices", [1, 8])
def test_shard_map_equals_one_device(devices, batch, one_device):
    assert_same(shard_mapped(devices, batch), one_device)


def test_order_of_records_does_not_matter(batch, one_device):
    """Centres belong to the records' numbers, not to the rows they happen to lie in."""
    features, record_index, codebook = batch
    order = np.random.default_rng(1).permutation(B)
    targets, rest = shard_mapped(8, (features[order], record_index[order], codebook))
    assert_same((targets[np.argsort(order)], rest), one_device)


def test_pmap_equals_one_device(batch, one_device):
    features, record_index, codebook = batch
    targets, rest = jax.pmap(
        functools.partial(every_reduction, axis_name="data"), axis_name="data", in_axes=(0, 0, None)
    )(features.reshape(8, 2, L, D), record_index.reshape(8, 2), codebook)
    for device in range(8):
        local = jax.tree.map(lambda leaf, device=device: leaf[device], rest)
        assert_same((targets.reshape(B, L, K), local), one_device)


def test_nothing_of_tokens_by_codes_by_width_is_made():
    tokens, codes, width = 400, 64, 48

    def work(features, codebook):
        labels = clustering.nearest_code(features, codebook)
        updated = clustering.update_codebook(
            codebook, jnp.ones(codes), features, labels, momentum=0.9, axis_name=None
        )
        return updated, clustering.kmeans_plus_plus(
            jax.random.key(0), features, jnp.arange(2), codes=codes, axis_name=None
        )

    shapes = (
        jax.ShapeDtypeStruct((2, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((codes, width), jnp.float32),
    )
    memory = jax.jit(work).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2 * tokens * codes * width / 4
