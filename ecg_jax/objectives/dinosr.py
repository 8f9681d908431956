"""DinoSR: predict, at the masked tokens, which codeword of an online codebook the teacher's token is nearest to (spec
§5.7; Liu et al., arXiv 2305.10005).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.encoder import Encoder
from ecg_jax.models.layers import standardise
from ecg_jax.objectives.clustering import code_usage, nearest_code, perplexity, update_codebook
from ecg_jax.objectives.contract import (
    Inputs,
    Terms,
    encode_masked,
    global_metric,
    last_layers,
    mean_over_tokens,
    predict_with_s4,
)
from ecg_jax.objectives.masking import Masking


def dinosr_features(layers: list[jax.Array]) -> jax.Array:
    """Teacher layers, each [B, L, D], standardised token by token, twice as the reference does; float32 [k, B, L, D].

    The second time matters only where the variance is near epsilon.
    """
    return standardise(standardise(jnp.stack(layers)))


def dinosr_loss(logits: jax.Array, labels: jax.Array, *, temperature: float) -> jax.Array:
    """Cross-entropy of each token, averaged over the codebooks.

    Args:
        logits: [k, B, L, K], one set for each codebook.
        labels: int [k, B, L].
        temperature: logits are divided by it.

    Returns:
        float32 [B, L].
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0].mean(axis=0)


class DinoSR(nn.Module):
    """Masked prediction of online codes of the teacher's last `top_k` layers, after their residual and norm.

    Attributes:
        encoder: bidirectional.
        width: D.
        mask: what the student does not see.
        top_k: teacher layers, each with a codebook and a block of the student's logits of its own.
        codes: K, codewords of each codebook.
        codebook_momentum: of the moving average that makes the codewords.
        temperature: the student's logits are divided by it.
        idle_logits: outputs of the head behind the others that nothing uses; with 256 of them, top_k = 1 and K = 256
            the head has the shape of the released one.
        head_state, head_dropout: of the S4 head.
    """

    encoder: Encoder
    width: int
    mask: Masking
    top_k: int = 2
    codes: int = 256
    codebook_momentum: float = 0.9
    temperature: float = 1.0
    idle_logits: int = 0
    head_state: int = 64
    head_dropout: float = 0.2
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.codes < 2:
            raise ValueError(f"codes={self.codes} must be at least 2")
        if not 0.0 <= self.codebook_momentum < 1.0:
            raise ValueError(f"codebook_momentum={self.codebook_momentum} must lie in [0, 1)")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if not 0 <= self.idle_logits <= 65536:
            raise ValueError(f"idle_logits={self.idle_logits} must lie between 0 and 65536")

    @nn.compact
    def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Terms, Terms]:
        """`code_loss` over masked tokens, see `objectives.contract`.

        Metrics: `accuracy` at the masked tokens; `perplexity` of the labels of the global batch, mean over the
        codebooks; `dead_codes`, the share of the codewords that no token of the global batch is nearest to;
        `masked_share`.
        """
        tokens, mask = encode_masked(self, inputs, train=train)
        out = self.top_k * self.codes + self.idle_logits
        predicted = predict_with_s4(self, tokens, inputs, out=out, train=train)
        used = predicted[..., : self.top_k * self.codes]
        logits = jnp.moveaxis(used.reshape(*used.shape[:2], self.top_k, self.codes), 2, 0)

        features = dinosr_features(last_layers(inputs.teacher, "block", self.top_k))
        labels = self._assign(features, train=train, axis_name=inputs.axis_name)

        loss = dinosr_loss(logits, labels, temperature=self.temperature)
        hits = (logits.argmax(axis=-1) == labels).mean(axis=0, dtype=jnp.float32)
        masked = mask.targets > 0
        usage = jax.vmap(lambda labels: code_usage(labels, self.codes, inputs.axis_name))(labels)
        return {"code_loss": mean_over_tokens(loss, masked)}, {
            "accuracy": mean_over_tokens(hits, masked),
            "perplexity": global_metric(perplexity(usage).mean(), len(masked)),
            "dead_codes": global_metric((usage == 0).mean(), len(masked)),
            "masked_share": mean_over_tokens(masked, jnp.ones_like(loss)),
        }

    def _assign(self, features: jax.Array, *, train: bool, axis_name: str | None) -> jax.Array:
        """Labels int32 [k, B, L] of features [k, B, L, D]; in training the codebooks move afterwards."""

        def initial():
            shape = (self.top_k, self.codes, self.width)
            return standardise(jax.random.normal(self.make_rng("params"), shape))

        codebook = self.variable("objective_state", "codebook", initial)
        code_sum = self.variable("objective_state", "code_sum", lambda: codebook.value)
        code_count = self.variable("objective_state", "code_count", jnp.ones, (self.top_k, self.codes))
        k, B, L, D = features.shape
        labels = nearest_code(features.reshape(k, B * L, D), codebook.value).reshape(k, B, L)
        if train and not self.is_initializing() and self.is_mutable_collection("objective_state"):

            def update(*args):
                return update_codebook(*args, momentum=self.codebook_momentum, axis_name=axis_name)

            codebook.value, code_sum.value, code_count.value = jax.vmap(update)(
                code_sum.value, code_count.value, features, labels
            )
        return labels
