"""kvstream's own codec: transform coding with one scalar step per level.

Keys are rotated back to position 0 (RoPE undone), the mean of every channel is removed, and the keys and values of
several layers are expressed together in a basis in which their coefficients are uncorrelated and an error of one step
costs the same in each: the eigenvectors of the covariance, measured in the metric of the model's own sensitivity. So
one step per level serves all of them, and most are zero throughout at the rates that matter. What is left is quantised
with a dead zone and centroids (`codec.quantize`) and rANS-coded, each column with the one of a few shared tables that
fits it in this chunk. Attention sinks are coded apart.

Everything that depends on the model is in the profile.

`parameters` checks what a profile holds; `fitting` calibrates one; `kinds`, `escapes`, `apart` and `rest` are the
sections beside the coded coefficients; `cpu` encodes and decodes with numba and torch; `triton_kernels`, `triton_job`
and `streaming` do so on GPUs; `codec` is the `Codec` that chooses between them.
"""

from __future__ import annotations

from kvstream.codec.kvstream.codec import KVStream
from kvstream.codec.kvstream.fitting import fit

__all__ = ["KVStream", "fit"]
