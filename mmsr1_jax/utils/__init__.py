"""General helpers: validated input files, output files, worker processes.

Any package of `mmsr1_jax` may import this one. It imports no other.
"""
