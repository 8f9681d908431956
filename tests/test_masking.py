"""Masks: parity of what is deterministic, the distributions that are drawn, and what is refused."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from conftest import group, load_golden
from ecg_jax.models.encoder import Encoder, tokens_of
from ecg_jax.objectives.masking import (
    STRATEGIES,
    Masking,
    block_size,
    first_pieces,
    place_blocks,
    spans_around,
)

SAMPLES, LEADS, L = 600, 12, 300
RELEASED_SPANS = Masking(strategy="span", probability=0.0065, last_token=False)
RELEASED_BLOCKS = Masking(strategy="block", min_keep=64, last_token=False)


@functools.partial(jax.jit, static_argnames=("masking", "samples", "leads"))
def draw(masking, key, record_index, samples=SAMPLES, leads=LEADS):
    return masking.draw(key, record_index, samples=samples, leads=leads)


@functools.partial(jax.jit, static_argnames=("masking", "batches", "records"))
def draw_batches(masking, batches, records):
    """[batches * records, ...] from as many keys as batches."""
    keys = jax.random.split(jax.random.key(7), batches)
    masks = jax.vmap(lambda key: masking.draw(key, jnp.arange(records), samples=SAMPLES, leads=LEADS))(keys)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), masks)


def unpack(packed):
    return np.unpackbits(packed, axis=-1)[..., :L].astype(bool)


# Parity.


@pytest.mark.parametrize("case", ["released", "dense", "odd_span"])
def test_span_parity(case):
    golden = group(load_golden("span_mask"), f"{case}/")
    midpoints, expected = unpack(golden["in/midpoints"]), unpack(golden["out/mask"])
    ours = spans_around(midpoints, span=int(golden["meta/span"]), last_token=False)
    np.testing.assert_array_equal(ours, expected)
    everywhere = np.asarray(spans_around(midpoints, span=int(golden["meta/span"]), last_token=True))
    np.testing.assert_array_equal(everywhere[:, :-1], expected[:, :-1])
    reached = midpoints[:, -1 - int(golden["meta/span"]) // 2 :].any(axis=1)
    np.testing.assert_array_equal(everywhere[:, -1], reached)


class _Through(nn.Module):
    """A stem or backbone that changes nothing."""

    backbone: bool = False

    def __call__(self, x, *_, train):
        return (x, {}) if self.backbone else x


def test_replacement_parity():
    """What the encoder's backbone sees of hidden tokens."""
    golden = group(load_golden("span_mask"), "apply/")
    hidden = spans_around(golden["in/midpoints"], span=int(golden["meta/span"]), last_token=False)
    ids = np.asarray(golden["out/mask_ids"])
    expected = np.zeros(hidden.shape, bool)
    expected[ids[:, 0], ids[:, 1]] = True
    np.testing.assert_array_equal(hidden, expected)
    encoder = Encoder(stem=_Through(), backbone=_Through(backbone=True), l_max=hidden.shape[1])
    tokens, out = encoder.apply(
        {}, golden["in/seq"], train=False, hidden=hidden, mask_token=jnp.asarray(golden["in/mask_item"][0])
    )
    np.testing.assert_array_equal(tokens, golden["out/seq"])
    np.testing.assert_array_equal(out["stem"], golden["in/seq"])


def test_block_size_parity():
    golden = load_golden("jepa_mask")
    sizes = jax.jit(
        functools.partial(block_size, tokens=int(golden["meta/timesteps"])), static_argnames=("low", "high")
    )
    uniforms = golden["out/uniforms"].astype(np.float32)
    target = np.clip(sizes(uniforms[:, 0], low=0.15, high=0.20), 64, 299)
    np.testing.assert_array_equal(target, golden["out/target_size"])
    np.testing.assert_array_equal(sizes(uniforms[:, 1], low=0.85, high=1.0), golden["out/context_size"])


def test_block_parity():
    golden = load_golden("jepa_mask")
    place = functools.partial(place_blocks, tokens=int(golden["meta/timesteps"]))
    of_steps = jax.jit(jax.vmap(jax.vmap(place, (0, None, 0, None))))
    names = ("target_start", "target_size", "context_start", "context_size")
    context, targets = jax.device_get(of_steps(*(golden[f"out/{name}"].astype(np.int32) for name in names)))
    own = ~golden["out/fallback"]
    np.testing.assert_array_equal((targets > 0).sum(axis=2), golden["out/target_union_count"])
    np.testing.assert_array_equal(context.sum(axis=2)[own], golden["out/context_count"][own])
    assert (context.sum(axis=2)[~own] < 64).all()
    blocks, contexts = unpack(golden["out/masks_pred"]), unpack(golden["out/masks_enc"])
    own = own[: len(blocks)]
    np.testing.assert_array_equal(targets[: len(blocks)], blocks.sum(axis=2))
    np.testing.assert_array_equal(context[: len(contexts)][own], contexts[own])


# Distributions.


def test_released_spans():
    hidden = np.asarray(draw_batches(RELEASED_SPANS, 1, 8000).hidden)
    assert hidden.mean() == pytest.approx(0.0625, abs=0.0025)  # four standard deviations
    assert (~hidden.any(axis=1)).mean() == pytest.approx(0.9935**L, abs=0.016)
    assert hidden[:, -1].mean() == pytest.approx(0.0065, abs=0.0036)
    assert hidden[:, -2].mean() == pytest.approx(1 - 0.9935**6, abs=0.009)


def test_described_spans_hide_half():
    masking = Masking(strategy="span")
    mask = draw_batches(masking, 1, 4000)
    hidden = np.asarray(mask.hidden)
    inside = hidden[:, 10:-10].mean()
    assert inside == pytest.approx(1 - 0.935**10, abs=0.005)
    assert 0.48 < hidden.mean() < 0.50
    # The edges are reached from one side only.
    assert hidden[:, 0].mean() == pytest.approx(1 - 0.935**5, abs=0.03)
    assert hidden[:, -1].mean() == pytest.approx(1 - 0.935**6, abs=0.03)
    np.testing.assert_array_equal(mask.targets, hidden)
    assert mask.signal is None


def _rate_per_token(sizes, *, last_token):
    """[sizes, L]: how often a block of each size, its start uniform, covers each token."""
    size, t = np.array(sizes)[:, None], np.arange(L)
    last_start = L - size - (not last_token)
    covering = np.minimum(t, last_start) - np.maximum(t - size + 1, 0) + 1
    return np.maximum(covering, 0) / (last_start + 1)


def test_released_blocks():
    """The facts of the reference sampler, over 2000 steps of 8 records: sizes are drawn once a step."""
    mask = draw_batches(RELEASED_BLOCKS, 2000, 8)
    targets, context = np.asarray(mask.targets), ~np.asarray(mask.hidden)
    assert (targets.sum(axis=1) == 4 * 64).all()
    assert (targets[:, -1] == 0).all()
    assert context.sum(axis=1).min() == 64
    replaced = (context & (targets > 0)).any(axis=1)
    assert (context.sum(axis=1)[replaced] == 64).all()
    assert replaced.mean() == pytest.approx(0.106, abs=0.01)
    inside = (context & (targets > 0))[replaced].sum(axis=1).mean()
    assert inside == pytest.approx(48, abs=1)
    assert (targets > 0).mean() == pytest.approx(0.586, abs=0.005)
    assert context.mean() == pytest.approx(0.348, abs=0.005)
    # Starts are uniform in 0..235.
    expected = 1 - (1 - _rate_per_token([64], last_token=False)[0]) ** 4
    deviation = np.sqrt(expected * (1 - expected) / len(targets))
    assert (np.abs((targets > 0).mean(axis=0) - expected) <= 5 * deviation).all()


def test_described_blocks():
    steps, records = 3000, 4
    mask = draw_batches(Masking(strategy="block"), steps, records)
    targets, context = np.asarray(mask.targets), ~np.asarray(mask.hidden)
    size = targets.sum(axis=1).reshape(steps, records) / 4
    assert (size == size[:, :1]).all()  # sizes are the batch's
    sizes, counts = np.unique(size[:, 0], return_counts=True)
    assert set(sizes) == set(range(45, 60))  # 15 to 20 % of 300 tokens
    assert np.abs(counts - steps / 15).max() < 5 * (steps / 15) ** 0.5
    assert len(np.unique(targets[:records], axis=0)) == records  # places are the record's
    assert not (context & (targets > 0)).any()
    np.testing.assert_array_equal(mask.visible, context)
    assert targets.max() > 1  # overlapping blocks count repeatedly
    untouched = ((1 - _rate_per_token(range(45, 60), last_token=True)) ** 4).mean(axis=0)
    seen = untouched * _rate_per_token(range(255, 300), last_token=True).mean(axis=0)
    for ours, expected in ((targets == 0, untouched), (context, seen)):
        assert np.abs(ours.mean(axis=0) - expected).max() < 5 * 0.5 / steps**0.5
        assert ours.mean() == pytest.approx(expected.mean(), abs=0.005)
        np.testing.assert_allclose(expected, expected[::-1])  # the last token is treated like the first


@pytest.mark.parametrize("patch", [1, 7, 10, 64])
@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.75])
def test_ratio_is_exact_and_everywhere(ratio, patch):
    masking = Masking(strategy="ratio", ratio=ratio, patch=patch)
    hidden = np.asarray(draw(masking, jax.random.key(1), jnp.arange(4000)).hidden)
    assert (hidden.sum(axis=1) == round(ratio * L)).all()
    share = hidden.mean(axis=0)
    if (ratio * L / patch).is_integer() and L % patch == 0:
        assert np.abs(share - ratio).max() < 0.04
    else:
        # The cut piece hides tokens near the ends of pieces a little more or less often.
        assert share.min() > ratio / 3
        assert share.max() < (2 + ratio) / 3
    # Whole pieces of the grid, but for one that is cut and the last of the window.
    pieces = np.pad(hidden, ((0, 0), (0, -L % patch)), mode="edge").reshape(4000, -1, patch)
    mixed = (pieces.any(axis=2) & ~pieces.all(axis=2)).sum(axis=1)
    assert mixed.max() <= 1


def test_pieces_follow_their_order():
    order = jnp.array([2, 0, 3, 1])  # of tokens 0-2, 3-5, 6-8, 9
    forwards = {2: {3, 4}, 3: {3, 4, 5}, 4: {3, 4, 5, 9}, 6: {0, 1, 3, 4, 5, 9}}
    backwards = {2: {4, 5}, 3: {3, 4, 5}, 4: {3, 4, 5, 9}, 6: {1, 2, 3, 4, 5, 9}}
    for direction, cases in enumerate([forwards, backwards]):
        for count, expected in cases.items():
            chosen = first_pieces(order, bool(direction), tokens=10, patch=3, count=count)
            assert set(np.flatnonzero(chosen)) == expected


def test_time_is_synchronous():
    mask = draw(Masking(strategy="time", ratio=0.4), jax.random.key(2), jnp.arange(500))
    signal, targets = np.asarray(mask.signal), np.asarray(mask.targets)
    assert (signal == signal[:, :, :1]).all()
    np.testing.assert_array_equal(signal[:, ::2, 0], targets > 0)
    np.testing.assert_array_equal(signal[:, 1::2, 0], targets > 0)
    assert (targets.sum(axis=1) == 0.4 * L).all()
    assert not mask.hidden.any()
    assert (np.diff(signal[:, ::20, 0].astype(int), axis=1) != 0).any()
    assert (signal.reshape(500, 30, 20, 12).any(axis=2) == signal.reshape(500, 30, 20, 12).all(axis=2)).all()


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.8])
def test_independent_leads(ratio):
    mask = draw(Masking(strategy="independent", ratio=ratio), jax.random.key(3), jnp.arange(500))
    signal = np.asarray(mask.signal)
    assert (signal.sum(axis=1) == round(ratio * L) * 2).all()
    leads = signal[:, ::20].reshape(-1, LEADS).astype(float)
    correlation = np.corrcoef(leads.T) - np.eye(LEADS)
    assert np.abs(correlation).max() < 0.06
    np.testing.assert_array_equal(mask.targets, signal[:, ::2].sum(axis=2) >= round(ratio * LEADS))
    assert 0.3 < mask.targets.mean() < 0.75
    assert not mask.hidden.any()


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.25, 3), (0.5, 6), (0.99, 11)])
def test_whole_leads(ratio, count):
    mask = draw(Masking(strategy="lead", ratio=ratio), jax.random.key(4), jnp.arange(3000))
    signal = np.asarray(mask.signal)
    assert (signal == signal[:, :1]).all()
    assert (signal[:, 0].sum(axis=1) == count).all()
    assert np.abs(signal[:, 0].mean(axis=0) - count / LEADS).max() < 0.04
    assert (np.asarray(mask.targets) == 1).all()
    assert not mask.visible.any()


def test_hide():
    x = np.random.default_rng(0).normal(1, 1, (3, SAMPLES, LEADS)).astype(np.float32)
    mask = draw(Masking(strategy="independent"), jax.random.key(0), jnp.arange(3))
    hidden = np.asarray(mask.hide(jnp.asarray(x)))
    np.testing.assert_array_equal(hidden == 0, mask.signal)
    np.testing.assert_array_equal(hidden[~np.asarray(mask.signal)], x[~np.asarray(mask.signal)])
    tokens_only = draw(Masking(), jax.random.key(0), jnp.arange(3))
    np.testing.assert_array_equal(tokens_only.hide(x), x)


def test_spans_never_hide_a_whole_window():
    """Spans as long as the window: every sixth window would be covered."""
    masking = Masking(strategy="span", probability=0.2, span=8)
    masking.check(16, LEADS)
    mask = draw(masking, jax.random.key(0), jnp.arange(4000), samples=16)
    visible = 8 - np.asarray(mask.hidden).sum(axis=1)
    assert visible.min() == 1
    alone = ~np.asarray(mask.hidden)[visible == 1]
    assert (alone.mean(axis=0) > 0.05).all()  # whichever token


# Records, devices, jit.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_belong_to_the_record(strategy):
    masking = Masking(strategy=strategy)
    key = jax.random.key(5)
    many, one = draw(masking, key, jnp.array([4, 2, 7])), draw(masking, key, jnp.array([2]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[0]), many, one)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(many)]
    assert any((leaf[0] != leaf[1]).any() for leaf in leaves)
    other = jax.tree.leaves(draw(masking, jax.random.key(6), jnp.array([4, 2, 7])))
    assert any((a != b).any() for a, b in zip(leaves, other, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_jit_and_devices_agree(strategy):
    masking = Masking(strategy=strategy)
    key, records = jax.random.key(8), jnp.arange(16)
    eager = masking.draw(key, records, samples=SAMPLES, leads=LEADS)
    jitted = draw(masking, key, records)
    mesh = Mesh(jax.devices(), "data")
    of_device = functools.partial(masking.draw, samples=SAMPLES, leads=LEADS)
    split = (PartitionSpec(), PartitionSpec("data"))
    mapped = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=split, out_specs=PartitionSpec("data")))
    by_pmap = jax.pmap(of_device, "data", in_axes=(None, 0))(key, records.reshape(8, 2))
    by_pmap = jax.tree.map(lambda a: a.reshape(16, *a.shape[2:]), by_pmap)
    for other in (jitted, mapped(key, records), by_pmap):
        jax.tree.map(np.testing.assert_array_equal, eager, other)


# Any window.


@st.composite
def maskings(draw):
    share = st.floats(0.02, 0.98)
    target, context = (
        sorted(draw(st.tuples(share, share))),
        sorted(draw(st.tuples(share, st.just(1.0) | share))),
    )
    return Masking(
        strategy=draw(st.sampled_from(list(STRATEGIES))),
        probability=draw(share),
        span=draw(st.integers(1, 40)),
        last_token=draw(st.booleans()),
        ratio=draw(share),
        patch=draw(st.integers(1, 40)),
        blocks=draw(st.integers(1, 6)),
        target_min=target[0],
        target_max=target[1],
        context_min=context[0],
        context_max=context[1],
        min_keep=draw(st.integers(1, 20)),
    )


def _accepted(masking, samples, leads):
    try:
        masking.check(samples, leads)
    except ValueError:
        return False
    return True


@settings(max_examples=15, deadline=None)
@given(maskings(), st.integers(15, 800), st.integers(1, 12))
def test_any_window(masking, samples, leads):
    """What `check` lets pass can be drawn, and leaves something to see."""
    assume(_accepted(masking, samples, leads))
    tokens = tokens_of(samples)
    mask = jax.device_get(
        draw(masking, jax.random.key(samples), jnp.arange(32), samples=samples, leads=leads)
    )
    assert mask.hidden.shape == mask.targets.shape == (32, tokens)
    assert not mask.hidden.all(axis=1).any()
    assert (mask.targets >= 0).all()
    if masking.strategy == "block":
        assert ((~mask.hidden).sum(axis=1) >= masking.min_keep).all()
        assert (mask.targets.sum(axis=1) >= masking.blocks * masking.min_keep).all()
    if masking.strategy == "ratio":
        assert (mask.hidden.sum(axis=1) == round(masking.ratio * tokens)).all()
    if masking.strategy in ("time", "independent", "lead"):
        assert mask.signal.shape == (32, samples, leads)
        assert not mask.hidden.any()
        assert mask.signal.any(axis=(1, 2)).all()
        assert not mask.signal.all(axis=(1, 2)).any()
    else:
        assert mask.signal is None


# Refusals.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_defaults_pass(strategy):
    Masking(strategy=strategy).check(SAMPLES, LEADS)


def test_released_settings_pass():
    RELEASED_SPANS.check(SAMPLES, LEADS)
    RELEASED_BLOCKS.check(SAMPLES, LEADS)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"strategy": "spam"}, r"mask\.strategy='spam' is unknown; known: span, block"),
        ({"probability": 0.0}, r"mask\.probability=0\.0 must lie between 0 and 1"),
        ({"probability": 1.0}, r"mask\.probability=1\.0 must lie between 0 and 1"),
        ({"probability": 0.9}, r"mask\.probability=0\.9 with mask\.span=10 leaves .* lower"),
        ({"probability": 1e-4}, r"mask\.probability=0\.0001 with mask\.span=10 hides 0\.3 tokens"),
        ({"span": 0}, r"mask\.span=0 must lie between 1 and 300"),
        ({"span": 301}, r"mask\.span=301 must lie between 1 and 300"),
        ({"strategy": "ratio", "ratio": 0.0}, r"mask\.ratio=0\.0 must lie between 0 and 1"),
        ({"strategy": "lead", "ratio": 1.0}, r"mask\.ratio=1\.0 must lie between 0 and 1"),
        ({"strategy": "time", "ratio": 0.001}, r"mask\.ratio=0\.001 hides 0 of the 300 tokens"),
        ({"strategy": "ratio", "ratio": 0.999}, r"mask\.ratio=0\.999 hides 300 of the 300 tokens"),
        ({"strategy": "independent", "patch": 0}, r"mask\.patch=0 must lie between 1 and 299"),
        ({"strategy": "time", "patch": 300}, r"mask\.patch=300 must lie between 1 and 299"),
        ({"strategy": "block", "blocks": 0}, r"mask\.blocks=0 must lie between 1 and 300"),
        ({"strategy": "block", "target_min": 0.3}, r"mask\.target_min=0\.3 must not exceed mask\.target_max=0\.2"),
        ({"strategy": "block", "context_max": 0.5}, r"mask\.context_min=0\.85 must not exceed mask\.context_max"),
        ({"strategy": "block", "target_min": 0.0}, r"mask\.target_min=0\.0 must be above 0"),
        ({"strategy": "block", "context_max": 1.1}, r"mask\.context_max=1\.1 must be above 0 and at most 1"),
        ({"strategy": "block", "target_min": 0.003}, r"mask\.target_min=0\.003 makes a block of no token.* 0\.0034"),
        ({"strategy": "block", "min_keep": 0}, r"mask\.min_keep=0 must lie between 1 and 299"),
        ({"strategy": "block", "min_keep": 300}, r"mask\.min_keep=300 must lie between 1 and 299"),
        (
            {"strategy": "block", "min_keep": 160},
            r"mask\.target_min=0\.15 and mask\.min_keep=160 make target blocks of at least 160 .* 140",
        ),
        ({"strategy": "block", "target_min": 1.0, "target_max": 1.0}, r"mask\.target_min=1\.0 and .* leaves 0 of the"),
    ],
)  # fmt: skip
def test_refusals(fields, says):
    with pytest.raises(ValueError, match="^" + says) as refusal:
        Masking(**fields).check(SAMPLES, LEADS)
    assert "\n" not in str(refusal.value)
    assert ". " not in str(refusal.value)


def test_one_lead_cannot_be_masked_by_leads():
    with pytest.raises(ValueError, match=r"mask\.strategy='lead' needs at least two leads"):
        Masking(strategy="lead").check(SAMPLES, 1)


def test_advice_is_right():
    """The bound that a refusal names is accepted."""
    Masking(strategy="block", target_min=0.0034).check(SAMPLES, LEADS)
    Masking(strategy="ratio", ratio=0.0033).check(SAMPLES, LEADS)
    Masking(strategy="ratio", ratio=0.996).check(SAMPLES, LEADS)


def test_only_the_fields_of_the_strategy_are_checked():
    broken = Masking(probability=2.0, span=0, ratio=7.0, patch=-1, blocks=0, target_min=3.0, min_keep=9999)
    dataclasses.replace(broken, probability=0.065, span=10).check(SAMPLES, LEADS)
    dataclasses.replace(broken, strategy="lead", ratio=0.5).check(SAMPLES, LEADS)
    dataclasses.replace(broken, strategy="time", ratio=0.5, patch=10).check(SAMPLES, LEADS)
    Masking(strategy="block", probability=2.0, span=0, ratio=7.0, patch=-1).check(SAMPLES, LEADS)


def test_an_unknown_strategy_draws_nothing():
    with pytest.raises(ValueError, match="known: span"):
        Masking(strategy="spam").draw(jax.random.key(0), jnp.arange(2), samples=SAMPLES, leads=LEADS)
