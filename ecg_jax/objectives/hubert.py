"""Masked prediction of cluster labels: HuBERT++ with online Sinkhorn k-means (spec §5.8), and HuBERT with labels made
offline from an earlier model's features (Hsu et al., arXiv 2106.07447).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.encoder import Encoder
from ecg_jax.models.heads import MLPHead
from ecg_jax.models.layers import uniform_bias, uniform_fan_in
from ecg_jax.objectives.clustering import (
    code_usage,
    cosines,
    kmeans_plus_plus,
    perplexity,
    sinkhorn_targets,
    temperature_at,
    unit_rows,
    update_prototypes,
)
from ecg_jax.objectives.contract import Inputs, Terms, encode_masked, global_metric, mean_over_tokens
from ecg_jax.objectives.masking import Masking

#: The reference multiplies the student's log-probabilities by this when alpha is 1 (spec §5.8).
MASKED_ONLY_SCALE = 10.0


def divergence(targets: jax.Array, log_p: jax.Array) -> jax.Array:
    """sum_k q (log q - log p) of targets q and log p, both [B, L, K]: float32 [B, L]."""
    return (jax.scipy.special.xlogy(targets, targets) - targets * log_p).sum(axis=-1)


def hubertpp_loss(
    logits: jax.Array,
    targets: jax.Array,
    masked: jax.Array,
    visible: jax.Array,
    *,
    temperature: jax.Array,
    alpha: float,
    entropy_weight: float,
) -> Terms:
    """The three losses of one codebook (spec §5.8).

    Args:
        logits: [B, L, K] of the student.
        targets: [B, L, K], rows sum to 1.
        masked, visible: bool [B, L], tokens to be predicted and tokens that the student sees.
        temperature: of the student.
        alpha: weight of the masked tokens; 1 - alpha is that of the visible ones. At 1 the masked tokens are all there
            is, and the log-probabilities count `MASKED_ONLY_SCALE` times.
        entropy_weight: of the entropy of the student's distribution at temperature 1, over all tokens.

    Returns:
        "masked_loss", "visible_loss" and "entropy_loss", each (values [B], weights [B]); the first alone at alpha = 1.
    """
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits / temperature)
    if alpha == 1:
        return {"masked_loss": mean_over_tokens(divergence(targets, MASKED_ONLY_SCALE * log_p), masked)}
    kl = divergence(targets, log_p)
    p = jax.nn.softmax(logits)
    entropy = -(p * jnp.log(p + 1e-8)).sum(axis=-1)
    return {
        "masked_loss": mean_over_tokens(alpha * kl, masked),
        "visible_loss": mean_over_tokens((1.0 - alpha) * kl, visible),
        "entropy_loss": mean_over_tokens(entropy_weight * entropy, jnp.ones_like(kl)),
    }


class HubertPP(nn.Module):
    """Prediction of soft assignments of the teacher's tokens to prototypes that are learned online.

    The prototypes are chosen from the tokens of the first training step by k-means++; until then they are random.

    Attributes:
        encoder: bidirectional.
        width: D.
        mask: what the student does not see.
        codes: number of prototypes of each codebook.
        alpha, entropy_weight: see `hubertpp_loss`.
        student_temperature_start, student_temperature: of the student's logits, at the first step and after
            `temperature_steps`, along half a cosine.
        teacher_temperature_start, teacher_temperature: of the targets, likewise.
        temperature_steps: 0 for constant temperatures.
        sinkhorn_rounds: see `sinkhorn_targets`.
        prototype_momentum: see `update_prototypes`.
    """

    encoder: Encoder
    width: int
    mask: Masking
    codes: tuple[int, ...] = (128, 256)
    alpha: float = 0.75
    student_temperature: float = 0.1
    student_temperature_start: float = 0.5
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.15
    temperature_steps: int = 200
    sinkhorn_rounds: int = 3
    prototype_momentum: float = 0.99
    entropy_weight: float = 1e-3
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if not self.codes or min(self.codes) < 2:
            raise ValueError(f"codes={self.codes} must name codebooks of at least 2 codes")
        _check_alpha(self.alpha)
        for name in ("student_temperature", "teacher_temperature"):
            for field in (name, f"{name}_start"):
                if getattr(self, field) <= 0:
                    raise ValueError(f"{field}={getattr(self, field)} must be positive")
        if self.temperature_steps < 0:
            raise ValueError(f"temperature_steps={self.temperature_steps} must not be negative")
        if not 1 <= self.sinkhorn_rounds <= 100:
            raise ValueError(f"sinkhorn_rounds={self.sinkhorn_rounds} must lie between 1 and 100")
        if self.entropy_weight < 0:
            raise ValueError(f"entropy_weight={self.entropy_weight} must not be negative")
        if not 0.0 <= self.prototype_momentum <= 1.0:
            raise ValueError(f"prototype_momentum={self.prototype_momentum} must lie in [0, 1]")

    @nn.compact
    def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Terms, Terms]:
        """`masked_loss{j}`, `visible_loss{j}` and `entropy_loss{j}` of codebook j, see `hubertpp_loss` and
        `objectives.contract`.

        Metrics, means over the codebooks where not said otherwise: `accuracy`, the share of masked tokens whose
        likeliest code is that of the targets; `kl` of targets and predictions over all tokens; `perplexity` of the
        nearest prototypes over the global batch (the targets are balanced by construction and would hide a collapse);
        `dead_codes`, the share of the prototypes that no token of the global batch is nearest to;
        `masked_share`.

        Raises:
            ValueError: in training, more codes than tokens in the global batch.
        """
        tokens, mask = encode_masked(self, inputs, train=train)
        predicted = MLPHead(width=self.width, out=sum(self.codes), dtype=self.dtype, name="head")(tokens)
        *starts, _ = [sum(self.codes[:j]) for j in range(len(self.codes) + 1)]
        features = unit_rows(inputs.teacher["tokens"])
        masked = mask.targets > 0
        student_temperature = temperature_at(
            inputs.step,
            start=self.student_temperature_start,
            end=self.student_temperature,
            steps=self.temperature_steps,
        )
        losses, metrics = {}, []
        for j, (start, codes) in enumerate(zip(starts, self.codes, strict=True)):
            logits = predicted[..., start : start + codes]
            targets, nearest = self._assign(j, features, inputs, train=train)
            terms = hubertpp_loss(
                logits,
                targets,
                masked,
                mask.visible,
                temperature=student_temperature,
                alpha=self.alpha,
                entropy_weight=self.entropy_weight,
            )
            losses |= {f"{name}{j}": term for name, term in terms.items()}
            usage = code_usage(nearest, codes, inputs.axis_name)
            metrics.append(
                {
                    "hits": logits.argmax(axis=-1) == targets.argmax(axis=-1),
                    "kl": divergence(targets, jax.nn.log_softmax(logits / student_temperature)),
                    "perplexity": perplexity(usage),
                    "dead_codes": (usage == 0).sum() / sum(self.codes),
                }
            )
        total = jax.tree.map(lambda *values: sum(values), *metrics)
        every = jnp.ones(masked.shape)
        return losses, {
            "accuracy": mean_over_tokens(total["hits"] / len(self.codes), masked),
            "kl": mean_over_tokens(total["kl"] / len(self.codes), every),
            "perplexity": global_metric(total["perplexity"] / len(self.codes), len(masked)),
            "dead_codes": global_metric(total["dead_codes"], len(masked)),
            "masked_share": mean_over_tokens(masked, every),
        }

    def _assign(self, j: int, features: jax.Array, inputs: Inputs, *, train: bool):
        """Targets [B, L, K] and nearest prototypes int [B, L] of codebook j for unit features [B, L, D]; in training
        the prototypes move afterwards.
        """
        codes, axis_name = self.codes[j], inputs.axis_name

        def random():
            return unit_rows(jax.random.normal(self.make_rng("params"), (codes, self.width)))

        stored = self.variable("objective_state", f"prototypes{j}", random)
        prototypes = stored.value
        moves = train and not self.is_initializing() and self.is_mutable_collection("objective_state")
        if moves:
            tokens = features.shape[0] * features.shape[1] * _devices(axis_name)
            if codes > tokens:
                raise ValueError(f"codes={codes} must not exceed the {tokens} tokens of a batch")
            key = self.make_rng("objective")
            first = inputs.step == 0
            prototypes = kmeans_plus_plus(
                key,
                features,
                inputs.record_index,
                codes=codes,
                axis_name=axis_name,
                instead_of=prototypes,
                when=first,
            )
            prototypes = jnp.where(first, unit_rows(prototypes), prototypes)
        similarity = cosines(features, prototypes)
        temperature = temperature_at(
            inputs.step,
            start=self.teacher_temperature_start,
            end=self.teacher_temperature,
            steps=self.temperature_steps,
        )
        targets = sinkhorn_targets(
            similarity, temperature=temperature, rounds=self.sinkhorn_rounds, axis_name=axis_name
        )
        if moves:
            stored.value = update_prototypes(
                prototypes, targets, features, momentum=self.prototype_momentum, axis_name=axis_name
            )
        return targets, similarity.argmax(axis=-1)


def hubert_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each token: logits [B, L, K], labels int [B, L]; float32 [B, L]. 0 where the label is -1."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels >= 0, -chosen, 0.0)


class Hubert(nn.Module):
    """Prediction of offline labels from the cosines of the projected tokens and learned code embeddings, as HuBERT-ECG
    does (Coppola et al. 2024).

    Attributes:
        encoder: bidirectional.
        width: D.
        mask: what the student does not see.
        codes: K, number of clusters that the labels come from.
        temperature: cosines are divided by it.
        alpha: weight of the masked tokens; 1 - alpha is that of the visible ones.
    """

    encoder: Encoder
    width: int
    mask: Masking
    codes: int = 500
    temperature: float = 0.1
    alpha: float = 1.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.codes < 2:
            raise ValueError(f"codes={self.codes} must be at least 2")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        _check_alpha(self.alpha)

    @nn.compact
    def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Terms, Terms]:
        """`masked_loss` and, for alpha below 1, `visible_loss`, see `objectives.contract`. Tokens with the label -1
        count nowhere.

        Metrics: `accuracy` at the masked tokens; `perplexity` of the codes predicted at the masked tokens of the
        global batch; `masked_share`.

        Raises:
            ValueError: no labels, other than at initialisation.
        """
        tokens, mask = encode_masked(self, inputs, train=train)
        projected = nn.Dense(
            self.width,
            kernel_init=uniform_fan_in,
            bias_init=uniform_bias(self.width),
            dtype=self.dtype,
            name="head",
        )(tokens)
        embeddings = self.param("code_embeddings", nn.initializers.normal(1.0), (self.codes, self.width))
        logits = cosines(unit_rows(projected), unit_rows(embeddings)) / self.temperature
        labels = inputs.labels
        if labels is None:
            if not self.is_initializing():
                raise ValueError("the objective hubert needs offline labels, and the batch has none")
            labels = jnp.full(mask.hidden.shape, -1, jnp.int32)

        loss = hubert_loss(logits, labels)
        labelled = labels >= 0
        masked = (mask.targets > 0) & labelled
        losses = {"masked_loss": mean_over_tokens(self.alpha * loss, masked)}
        if self.alpha < 1:
            losses["visible_loss"] = mean_over_tokens((1.0 - self.alpha) * loss, mask.visible & labelled)
        predicted = logits.argmax(axis=-1)
        usage = code_usage(jnp.where(masked, predicted, -1), self.codes, inputs.axis_name)
        return losses, {
            "accuracy": mean_over_tokens(predicted == labels, masked),
            "perplexity": global_metric(perplexity(usage), len(masked)),
            "masked_share": mean_over_tokens(mask.targets > 0, jnp.ones_like(loss)),
        }


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha={alpha} must be above 0 and at most 1")


def _devices(axis_name: str | None) -> int:
    return jax.lax.axis_size(axis_name) if axis_name else 1
