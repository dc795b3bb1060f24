"""Policies: what all families share, and one package per family (see `families`).

Used by all code that runs a model. Imports only `config` and `utils`.
"""
