"""Rewards of episodes: the rule-based reward function, which also takes a judge's verdicts.

Used by training and evaluation.
"""
