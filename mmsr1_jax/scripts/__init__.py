"""Small commands: the local index, merging adapters, the tiny world, the demo, the tool cache.

Nothing imports them but other scripts and tests.
"""
