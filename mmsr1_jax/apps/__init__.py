"""Applications with a page of their own: the report of a run, and the demo server.

Used by the commands `report` and `serve` alone.
"""
