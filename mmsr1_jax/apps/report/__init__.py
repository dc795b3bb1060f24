"""What a run or an evaluation did, as one page to look at: `python -m mmsr1_jax.report`."""
