"""The teacher: a second encoder whose features are the targets of JEPA, data2vec, DinoSR and HuBERT++ (spec
§5.1).

Its variables are a tree beside the student's, {"params", "batch_stats", "ssm"} of `models.encoder.Encoder`,
applied by the same module.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

MODES = ("ema", "frozen_random")
STATISTICS = ("own", "ema")


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
        batch_stats: running statistics of the teacher's BatchNorms. "own": of its own activations, from the first batch
            on, which the very first targets use already. "ema": the student's, averaged with m like the parameters;
            at m = 0.9996 they keep the initial variance of 1 for thousands of steps. Neither they nor a copy of the
            student's, whose weights run ahead, are those of the teacher's activations: its features shrink.
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
        if self.batch_stats != "own" and (self.mode == "frozen_random" or self.train_mode):
            raise ValueError(
                f"teacher.batch_stats={self.batch_stats!r} needs teacher.mode='ema' and teacher.train_mode=False; a "
                "random teacher follows nobody, and in training mode the statistics of the batch count: take 'own'"
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
        dropout_key: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Features of unmasked x [B, T, C] in training, and the teacher's running statistics with which to go on.

        Args:
            encoder: `models.encoder.Encoder`.
            variables: collections of the teacher, with the kernel `basis`.
            x, record_index: as in `Inputs`.
            dropout_key: for `train_mode`.
        """
        if self.batch_stats == "ema":
            return self.eval_features(encoder, variables, x), variables["batch_stats"]
        (tokens, out), updates = encoder.apply(
            variables,
            x,
            record_index,
            train=self.train_mode,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        return {"tokens": tokens, **out}, updates["batch_stats"]

    def eval_features(self, encoder, variables: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
        """Features of unmasked x [B, T, C] in evaluation mode, as in validation."""
        tokens, out = encoder.apply(variables, x, train=False)
        return {"tokens": tokens, **out}

    def follow(self, teacher: dict[str, Any], student: dict[str, Any], step: jax.Array) -> dict[str, Any]:
        """The teacher after the student's update number `step`, 0 for the first; collections of the two encoders."""
        if self.mode == "frozen_random":
            return teacher
        rate = self.rate_at(step)
        following = ("params", "batch_stats") if self.batch_stats == "ema" else ("params",)
        return teacher | {name: ema(teacher[name], student[name], rate) for name in following}


def ema(average: Any, value: Any, rate: jax.Array | float) -> Any:
    """average + rate (value - average), leaf by leaf: the moving average of momentum 1 - rate (spec §5.1)."""
    return jax.tree.map(lambda a, v: a + rate * (v - a), average, value)
