"""Small commands: local index, adapter merging, settings, rewards, tiny world, demo, tool cache.

Only other scripts and tests import them.
"""
