"""Reinforcement learning: advantages, the loss, packed rows, and the update."""
