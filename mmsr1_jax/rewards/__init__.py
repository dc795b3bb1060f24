"""Rewards of episodes: the rule-based reward function and the judge.

Used by training and evaluation.
"""
