"""Helpers without a subject of their own: validated files, output files, worker processes.

Any room may use them; they use nothing else of the package.
"""
