"""General helpers: validated input files, output files, worker processes.

Any package of `mmsr1_jax` but `config` may import this one. It imports `config` alone.
"""
