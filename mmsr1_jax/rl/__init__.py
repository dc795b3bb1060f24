"""Reinforcement learning: advantages, loss, sequence packing and the policy update."""
