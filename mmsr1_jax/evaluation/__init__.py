"""Evaluation: workflows (`workflows`), episodes on disk (`records`), metrics (`metrics`), paired
comparisons (`compare`) and the results table (`table`).

Used by the commands `evaluate` and `curate`, and by the report.
"""
