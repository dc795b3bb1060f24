"""Rollouts: decoding that pauses at search tags and resumes with the search results.

`engine` and `pool` are the interface for other rooms, `build` creates them from settings.
Used by the commands, training, evaluation and `serve`.
"""
