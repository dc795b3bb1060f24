"""Small commands: the local index, merging adapters, the tiny world, the demo, the tool cache.

Only other scripts and tests import them.
"""
