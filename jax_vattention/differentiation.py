"""Reading and writing a KV cache has no derivative; this says so instead of whatever JAX would say."""

from __future__ import annotations

from typing import TypeVar

import jax

from jax_vattention.errors import NotDifferentiableError

_Operands = TypeVar("_Operands")


def not_differentiable(operands: _Operands) -> _Operands:
    """`operands`, a pytree, as they are. A program that does not differentiate them compiles to what it was without.

    Raises:
      NotDifferentiableError: a derivative with respect to one of them is asked for, in forward or reverse mode.
    """
    return _identity(operands)


@jax.custom_jvp
def _identity(operands):
    return operands


@_identity.defjvp
def _raise(primals, tangents):
    raise NotDifferentiableError(
        "attention over a KV cache is not differentiable: use jax.nn.dot_product_attention for training; where no "
        "gradient is to flow through the cache, pass jax.lax.stop_gradient of q, k and v"
    )
