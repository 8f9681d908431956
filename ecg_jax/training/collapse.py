"""Is the encoder collapsing? What shows it at every logging step, and the sentences that say so.

At a logging step the student, and the teacher of an objective that has one, encode the training batch once
more, unmasked and in evaluation mode. Two numbers describe what comes out; neither depends on its scale:

    rankme       effective number of directions the features span, see `rankme`
    feature_std  how much they depend on the recording, see `feature_std`

Objectives with codes report `perplexity` and `dead_codes` themselves. `findings` compares all of them with
the limits of `config.monitor`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ecg_jax.models.inputs import to_model_input
from ecg_jax.objectives.teacher import Teacher
from ecg_jax.training import parallel
from ecg_jax.training.train_state import TrainState


def student_tokens(state: TrainState, x: jax.Array, record_index: jax.Array, model) -> jax.Array:
    """Final tokens of the student's encoder in evaluation mode: model input [B, T, C] to float32 [B, L, D]."""
    variables = {name: tree["encoder"] for name, tree in state.variables().items() if "encoder" in tree}
    tokens, _ = model.encoder.apply(variables, x, record_index, train=False)
    return tokens.astype(jnp.float32)


def observe_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model,
    normalisation: str,
    kept_leads: tuple[str, ...],
    teacher: Teacher | None = None,
    axis_name: str | None = parallel.AXIS,
) -> dict[str, dict[str, jax.Array]]:
    """Moments of the features of one batch, as seen by one device.

    Args:
        state, batch, model, normalisation, kept_leads, teacher, axis_name: as in `training.train_state.train_step`.

    Returns:
        {"student": moments, "teacher": moments}, the second for objectives with a teacher; see `moments`. The
        same on every device.
    """
    x, record_index = to_model_input(batch["signal"], normalisation, kept_leads), batch["record_index"]
    seen = {"student": moments(student_tokens(state, x, record_index, model), axis_name)}
    if teacher:
        features = teacher.eval_features(model.encoder, state.teacher_variables(), x)
        seen["teacher"] = moments(features["tokens"].astype(jnp.float32), axis_name)
    return seen


def moments(tokens: jax.Array, axis_name: str | None) -> dict[str, jax.Array]:
    """Second moments of tokens [B, L, D] over the global batch of N records.

    Returns:
        `second_moment` [D, D], the mean of z zᵀ over all tokens z; `between`, the variance between records at
        the same token and feature (unbiased, 0 for N = 1), averaged over tokens and features; `power`, the
        mean square; `records`, N.
    """

    def total(values):
        return jax.lax.psum(values, axis_name) if axis_name else values

    B, L, D = tokens.shape
    N = B * (jax.lax.axis_size(axis_name) if axis_name else 1)
    flat = tokens.reshape(B * L, D)
    # Full precision also where the run computes in less: a spectrum shows rounding as rank.
    products = jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    deviation = tokens - total(tokens.sum(axis=0)) / N  # not E z² - (E z)², which cancels near a collapse
    return {
        "second_moment": total(products) / (N * L),
        "between": total(jnp.square(deviation).sum()) / (max(N - 1, 1) * L * D),
        "power": total(jnp.square(tokens).sum()) / (N * L * D),
        "records": jnp.asarray(N, jnp.float32),
    }


def rankme(second_moment: np.ndarray) -> float:
    """RankMe of features with this second moment [D, D] (Garrido et al., arXiv 2210.02885).

        exp(-Σ p_k log p_k),   p_k = σ_k / Σ σ_j,

    with σ the singular values of the features, the square roots of the eigenvalues here: 1 for features along
    one line, D for features that fill all directions evenly. As in the paper the features are not centred. A
    constant encoder then has rank one; centred, only its rounding errors would be left, and those point
    everywhere. Eigenvalues that float32 cannot tell from zero count as zero.

    Returns:
        From 1 to D; 0 for features that are all zero or not finite.
    """
    second_moment = np.asarray(second_moment, np.float64)
    if not np.isfinite(second_moment).all() or not second_moment.any():
        return 0.0
    eigenvalues = np.linalg.eigvalsh(second_moment)
    noise = 16 * np.finfo(np.float32).eps * eigenvalues[-1]
    sigma = np.sqrt(eigenvalues[eigenvalues > noise])
    p = sigma / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def feature_std(seen: dict[str, np.ndarray]) -> float:
    """Standard deviation between records at the same token position, relative to the features' rms.

    0 for an encoder that gives every recording the same tokens, also if they differ from position to position; about 1
    for one whose tokens have nothing in common between recordings. 0 for features that are all zero or not finite.
    """
    between, power = float(seen["between"]), float(seen["power"])
    if not (np.isfinite(between) and np.isfinite(power) and power > 0):
        return 0.0
    return float(np.sqrt(between / power))


def describe(seen: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`rankme`, `feature_std` and, with a teacher, `teacher_feature_std` from what `observe_step` returned."""
    scalars = {"rankme": rankme(seen["student"]["second_moment"])}
    if seen["student"]["records"] < 2:  # nothing to differ from
        return scalars
    scalars["feature_std"] = feature_std(seen["student"])
    if "teacher" in seen:
        scalars["teacher_feature_std"] = feature_std(seen["teacher"])
    return scalars


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a healthy run keeps to; fields of `config.monitor`.

    Attributes:
        min_rankme, min_feature_std, min_perplexity: lowest values; 0 switches a rule off.
        max_dead_share: largest `dead_codes`, the share of the codes that no token of a batch has; 1 switches it off.
    """

    min_rankme: float
    min_feature_std: float
    min_perplexity: float
    max_dead_share: float


_TEACHER_HELP = "a teacher that follows more slowly (objective.teacher.momentum) or a lower learning_rate"
_CODES_HELP = "fewer codes (objective.codes), a larger batch_size or a lower optimiser.learning_rate"

# Metric -> its limit, what it means to fall short of it, what usually helps.
_LOWEST = {
    "rankme": (
        "min_rankme",
        "the features vary along hardly any direction",
        "a lower optimiser.learning_rate, optimiser.warmup_steps or optimiser.clip_norm",
    ),
    "feature_std": (
        "min_feature_std",
        "the encoder gives nearly the same features for every recording",
        "a lower optimiser.learning_rate, optimiser.warmup_steps or optimiser.clip_norm",
    ),
    "teacher_feature_std": (
        "min_feature_std",
        "the teacher's targets are nearly the same for every recording",
        _TEACHER_HELP,
    ),
    "perplexity": ("min_perplexity", "nearly all tokens have the same code", _CODES_HELP),
}


def findings(scalars: dict[str, float], limits: Limits) -> dict[str, str]:
    """What of a step's numbers looks like a collapse.

    Args:
        scalars: numbers of one logged step; what is not among them is not judged.
        limits: to judge by.

    Returns:
        Name of the number -> one sentence with its value, its limit and what usually helps; {} when healthy.
    """
    found = {}
    for name, (field, meaning, remedy) in _LOWEST.items():
        limit = getattr(limits, field)
        if name in scalars and scalars[name] < limit:
            found[name] = (
                f"{name}={scalars[name]:.3g} is below config.monitor.{field}={limit:g}: {meaning}; "
                f"what usually helps: {remedy}"
            )
    if "dead_codes" in scalars and scalars["dead_codes"] > limits.max_dead_share:
        found["dead_codes"] = (
            f"dead_codes={scalars['dead_codes']:.3g} is above config.monitor.max_dead_share={limits.max_dead_share:g}: "
            f"most codes stand for no token; what usually helps: {_CODES_HELP}"
        )
    return found


class Monitor:
    """Watches a run: what to compute beside a step, what it means, and what is news.

    Everything is a function of the state, the batch and the step, so an interrupted run logs the same.
    """

    def __init__(self, limits: Limits, mesh: Mesh, *, probe, probe_every: int, **bound):
        """Of one run.

        Args:
            limits: of a healthy run.
            mesh: all devices.
            probe: `evaluation.online_probe.OnlineProbe`, None for none.
            probe_every: steps between probes.
            **bound: model, normalisation, kept_leads and teacher, as in `observe_step`.
        """
        self._observe = parallel.map_eval_step(functools.partial(observe_step, **bound), mesh)
        self._limits = limits
        self._probe, self._probe_every = probe, probe_every
        self._standing: set[str] = set()

    def compile(self, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Runs everything once: no later step waits for a compiler, and what does not fit in memory fails now."""
        seen = self._observe(state, batch), self._probe and self._probe.embed(state, batches=1)
        jax.block_until_ready(seen)

    def watch(self, state: TrainState, batch: dict[str, jax.Array], step: int, logged: bool) -> dict:
        """Starts computing what the log needs of this state, before the next step overwrites it.

        Args:
            state: after `step` steps.
            batch: the batch of that step.
            step: steps done.
            logged: whether a line is due in any case.

        Returns:
            For `read`, once the step is logged; {} when nothing is due.
        """
        probing = self._probe is not None and step % self._probe_every == 0
        seen = {"features": self._observe(state, batch)} if logged or probing else {}
        return seen | ({"probe": self._probe.embed(state)} if probing else {})

    def read(self, seen: dict) -> dict[str, float]:
        """The numbers of a step; waits for the device."""
        scalars = describe(jax.device_get(seen["features"])) if "features" in seen else {}
        return scalars | (self._probe.score(jax.device_get(seen["probe"])) if "probe" in seen else {})

    def judge(self, scalars: dict[str, float]) -> tuple[list[str], list[str]]:
        """(every finding, those that did not hold at the step judged before), sentences as in `findings`."""
        found = findings(scalars, self._limits)
        news = [sentence for name, sentence in found.items() if name not in self._standing]
        self._standing = set(found)
        return list(found.values()), news
