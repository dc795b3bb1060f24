"""Web applications: the report of a run, and the demo server.

Used only by the commands `report` and `serve`.
"""
