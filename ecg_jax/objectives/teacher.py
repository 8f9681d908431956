"""The teacher: a second encoder whose features are the targets of JEPA, data2vec, DinoSR and HuBERT++ (spec
§5.1).

Its variables are a tree beside the student's, {"params", "batch_stats", "ssm"} of `models.encoder.Encoder`,
applied by the same module.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ecg_jax.models.layers import STATISTICS_MOMENTUM, batch_statistics

MODES = ("ema", "frozen_random")
STATISTICS = ("student", "ema", "own")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How the teacher begins, moves and runs; the fields of `config.objective.teacher`.

    Attributes:
        mode: "ema": begins as a copy of the student and follows it, theta_t <- m theta_t + (1 - m) theta_s
            after every update. "frozen_random": an independent random encoder that never moves, as in the
            released code (spec §5.2).
        momentum, momentum_end: m at the first step and after the last, along half a cosine; equal for a
            constant m.
        steps: length of the run.
        train_mode: targets with dropout and batch statistics instead of evaluation mode.
        batch_stats: running statistics of the teacher's BatchNorms. "student": of the batches that the student has
            seen, from the first one on, which the very first targets use already. "ema": the student's running
            statistics averaged with m like the parameters; at m = 0.9996 these keep the initial variance of 1 for
            thousands of steps, which shrinks the features of millivolt signals until tokens hardly differ. "own":
            those of the teacher's own forward passes, for `train_mode`.
    """

    mode: str
    momentum: float
    momentum_end: float
    train_mode: bool
    batch_stats: str
    steps: int

    def __post_init__(self):
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("batch_stats", self.batch_stats, STATISTICS),
        ):
            if value not in known:
                raise ValueError(f"teacher.{name}={value!r} is unknown; known: {', '.join(known)}")
        for name in ("momentum", "momentum_end"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(
                    f"teacher.{name}={getattr(self, name)} must be above 0 and at most 1; a teacher without momentum "
                    "is the student itself"
                )
        if self.mode == "frozen_random" and not (self.train_mode and self.batch_stats == "own"):
            raise ValueError(
                "teacher.mode='frozen_random' needs teacher.train_mode=True and teacher.batch_stats='own': a random "
                "teacher has no statistics but those of its own batches"
            )
        if self.batch_stats == "own" and not self.train_mode:
            raise ValueError(
                "teacher.batch_stats='own' needs teacher.train_mode=True: in evaluation mode no batch is measured"
            )

    def rate_at(self, step: jax.Array) -> jax.Array:
        """1 - m at update number `step`, 0 for the first. m itself would lose the digits of 1 - m in float32."""
        progress = jnp.clip(step / max(self.steps - 1, 1), 0.0, 1.0)
        ramp = 0.5 * (1.0 - jnp.cos(jnp.pi * progress))
        return (1.0 - self.momentum) + (self.momentum - self.momentum_end) * ramp

    def initial(self, student: dict[str, Any], random: dict[str, Any]) -> dict[str, Any]:
        """The teacher at step 0, from the student's variables and those of a freshly drawn encoder."""
        return jax.tree.map(jnp.copy, student if self.mode == "ema" else random)

    def features(
        self,
        encoder,
        variables: dict[str, Any],
        x: jax.Array,
        record_index: jax.Array,
        *,
        step: jax.Array,
        dropout_key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Features of unmasked x [B, T, C] in training, and the teacher's running statistics with which to go on.

        Args:
            encoder: `models.encoder.Encoder`.
            variables: collections of the teacher, with the kernel `basis`.
            x, record_index, step: as in `Inputs`.
            dropout_key: for `train_mode`.
        """

        def train_call():
            return encoder.apply(
                variables, x, record_index, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
            )

        statistics = variables["batch_stats"]
        if self.train_mode:
            (tokens, out), updates = train_call()
            return {"tokens": tokens, **out}, updates["batch_stats"]
        if self.batch_stats == "student":
            statistics = jax.lax.cond(
                step == 0,
                lambda: batch_statistics(statistics, train_call()[1]["batch_stats"]),
                lambda: variables["batch_stats"],
            )
        return self.eval_features(encoder, variables | {"batch_stats": statistics}, x), statistics

    def eval_features(self, encoder, variables: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
        """Features of unmasked x [B, T, C] in evaluation mode, as in validation."""
        tokens, out = encoder.apply(variables, x, train=False)
        return {"tokens": tokens, **out}

    def follow(
        self, teacher: dict[str, Any], before: dict[str, Any], after: dict[str, Any], step: jax.Array
    ) -> dict[str, Any]:
        """The teacher after the student's update number `step`.

        Args:
            teacher: its collections.
            before, after: `params` and `batch_stats` of the student's encoder before and after the update.
            step: 0 for the first.
        """
        if self.mode == "frozen_random":
            return teacher
        rate = self.rate_at(step)
        if self.batch_stats == "ema":
            statistics = ema(teacher["batch_stats"], after["batch_stats"], rate)
        elif self.batch_stats == "student":
            measured = batch_statistics(before["batch_stats"], after["batch_stats"])
            # The mean of the batches so far, until it is long enough for the running average of a BatchNorm.
            statistics = ema(
                teacher["batch_stats"], measured, jnp.maximum(1.0 - STATISTICS_MOMENTUM, 1.0 / (step + 1))
            )
        else:
            statistics = teacher["batch_stats"]
        return teacher | {"params": ema(teacher["params"], after["params"], rate), "batch_stats": statistics}


def ema(average: Any, value: Any, rate: jax.Array | float) -> Any:
    """average + rate (value - average), leaf by leaf: the moving average of momentum 1 - rate (spec §5.1)."""
    return jax.tree.map(lambda a, v: a + rate * (v - a), average, value)
