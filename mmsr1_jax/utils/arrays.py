"""Array types for annotations with shapes (jaxtyping)."""

import jax
import numpy as np

# Array in host or device memory: NumPy's before it is put on devices, JAX's after.
AnyArray = jax.Array | np.ndarray
