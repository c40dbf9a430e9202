"""Generation: requests in, tokens out."""

from jax_vattention.engine.engine import Engine as Engine
from jax_vattention.engine.request import Output as Output
from jax_vattention.engine.request import Request as Request
