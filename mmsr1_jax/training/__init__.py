"""Code shared by `train` and `sft`: run directories, checkpoints, metrics, SFT data.

Also used by other commands, evaluation and the report.
"""
