"""AdamW with one learning rate for each part of the model (spec §5.0, §11.2)."""

from typing import Any

import jax
import optax

#: The parts of a model that have a learning rate of their own.
GROUPS = ("head", "backbone", "stem", "ssm")
SSM_PARAMETERS = ("Lambda", "P", "B", "log_dt")


def group_of(path: tuple[str, ...]) -> str:
    """The group of the parameter at `path`, e.g. ("encoder", "stem", "conv0", "kernel") -> "stem"."""
    if path[-1] in SSM_PARAMETERS:
        return "ssm"
    if path[0] == "encoder":
        return path[1]
    return "backbone" if path[0] == "mask_token" else "head"


def groups_of(params: dict[str, Any]) -> dict[str, Any]:
    """A tree like `params` with the group's name at each leaf."""
    return jax.tree.map_with_path(lambda path, _: group_of(tuple(entry.key for entry in path)), params)


def learning_rate(*, base: float, schedule: str, warmup_steps: int, steps: int) -> optax.Schedule:
    """Learning rate of group factor 1 over the steps of a run.

    Args:
        base: the plateau or peak.
        schedule: "constant" (after a linear warm-up of `warmup_steps`) or "cosine" (warm-up, then to zero at
            `steps`).
        warmup_steps: 0 for none.
        steps: length of the run.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "constant":
        after = optax.constant_schedule(base)
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(base, max(steps - warmup_steps, 1))
    else:
        raise ValueError(f"unknown learning-rate schedule {schedule!r}; known: constant, cosine")
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, base, warmup_steps), after], [warmup_steps])


def build_optimiser(
    schedule: optax.Schedule,
    *,
    factors: dict[str, float],
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW with decoupled decay on every parameter but those of the state space model.

    Args:
        schedule: learning rate of factor 1.
        factors: learning-rate factor of each group of `GROUPS`.
        weight_decay: applied to the groups head, backbone and stem; the `ssm` group never decays (spec §3.3).
        b1, b2, eps: of Adam; eps is added outside the root.
        clip_norm: global gradient norm to clip to; 0 for no clipping.
    """

    def adamw(group):
        factor = factors[group]
        return optax.adamw(
            lambda step: factor * schedule(step),
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=0.0 if group == "ssm" else weight_decay,
        )

    tx = optax.multi_transform({group: adamw(group) for group in GROUPS}, groups_of)
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
