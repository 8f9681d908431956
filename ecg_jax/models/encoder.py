"""The encoder that pretraining makes and every probe uses: stem, then backbone."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models import s4
from ecg_jax.models.net1d import Net1D
from ecg_jax.models.s4 import S4Backbone
from ecg_jax.models.stem import Stem
from ecg_jax.models.transformer import Transformer


class Encoder(nn.Module):
    """Stem and backbone under the names `stem` and `backbone`, the schema of every checkpoint.

    Attributes:
        stem: maps samples [B, T, C] to tokens [B, L, D].
        backbone: maps tokens [B, L, D] to (tokens [B, L, D], intermediates).
        l_max: tokens for which the output vectors of S4 layers are length-corrected, of a head's too.
        conv: algorithm of S4 convolutions, of a head's too.
    """

    stem: nn.Module
    backbone: nn.Module
    l_max: int
    conv: str = "auto"

    def __call__(
        self,
        x: jax.Array,
        record_index: jax.Array | None = None,
        *,
        train: bool,
        hidden: jax.Array | None = None,
        mask_token: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes x [B, T, C].

        Args:
            x: model input, see `inputs.to_model_input`.
            record_index: [B] number of each record within the global batch; keys the dropout masks.
            train: batch statistics and dropout.
            hidden, mask_token: bool [B, L] and [D]; the backbone sees `mask_token` in place of the stem's
                tokens there.

        Returns:
            tokens [B, L, D] and a dict of intermediates: `stem` [B, L, D], before any replacement, and those
            of the backbone.
        """
        encoded = self.stem(x, train=train)
        seen = encoded
        if hidden is not None:
            seen = jnp.where(hidden[..., None], mask_token.astype(encoded.dtype), encoded)
        tokens, out = self.backbone(seen, record_index, train=train)
        return tokens, {"stem": encoded, **out}


#: Name of a backbone -> its module.
BACKBONES = {"s4": S4Backbone, "transformer": Transformer, "net1d": Net1D}


def build_encoder(
    *,
    backbone: str,
    width: int,
    l_max: int,
    conv: str = "auto",
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    name: str | None = None,
    **fields: Any,
) -> Encoder:
    """An encoder from plain values; the keywords are the fields of `config.model`, `fields` those of its backbone.

    Raises:
        ValueError: unknown backbone, or a backbone cannot have such fields.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"model.backbone={backbone!r} is unknown; known: {', '.join(BACKBONES)}")
    if backbone == "s4":
        fields |= {"l_max": l_max, "conv": conv}
    # A config that was read from JSON has lists.
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Encoder(
        stem=Stem(width=width, axis_name=axis_name, dtype=dtype),
        backbone=BACKBONES[backbone](width=width, dtype=dtype, **fields),
        l_max=l_max,
        conv=conv,
        name=name,
    )


def tokens_of(samples: int) -> int:
    """Tokens L that the stem makes of a window of T samples."""
    return (samples + 1) // 2


def constants(variables: dict[str, Any], *, length: int, l_max: int) -> dict[str, Any]:
    """What `apply` needs beside params and batch_stats: the `ssm` collection and the kernel `basis` derived
    from it.

    Args:
        variables: from `init` or a checkpoint; `ssm` is absent when the state matrices are trained.
        length: tokens of a window.
        l_max: `config.model.l_max`.

    Returns:
        {"ssm": ..., "basis": ...}, or {} when there is no `ssm`.
    """
    if "ssm" not in variables:
        return {}
    return {"ssm": variables["ssm"], "basis": s4.kernel_bases(variables["ssm"], length=length, l_max=l_max)}
