"""Episodes: their record, the parser of turns, and the rules for the step after each turn.

No device code. Used by rollouts, rewards, evaluation and the applications.
"""
