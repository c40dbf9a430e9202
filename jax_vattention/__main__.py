"""`python -m jax_vattention`."""

import sys

from jax_vattention.cli import main

sys.exit(main())
