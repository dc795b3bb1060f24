"""Applications: the report of a run, the demo server, and plans for accelerators.

Used only by the commands `report`, `serve` and `plan`.
"""
