"""Episodes: their record, the parser of turns, and the rules of what follows a turn.

No device code. Used by rollouts, rewards, evaluation and the applications.
"""
