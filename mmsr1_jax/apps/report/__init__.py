"""HTML report of a training run or an evaluation: `python -m mmsr1_jax.report`."""
