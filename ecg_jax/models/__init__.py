"""Flax linen modules: stem, backbones, heads.

Letters, fixed once for the whole package: B batch, T samples, L tokens, C leads, D width, H SSM channels, N
state size, K codes. Shapes are written as `[B, L, D]`.
"""
