"""Reinforcement learning: advantages, loss, sequence packing and the policy update.

Used by the training commands and `training`. Knows episodes, but no engine.
"""
