"""What `train` and `sft` share: run directories, checkpoints, metrics, SFT data.

Used by the commands, evaluation and the report.
"""
