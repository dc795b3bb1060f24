"""Policies, one package per architecture, with attention and sharding for all of them.

Used by all code that runs a model. Imports only `config` and `utils`.
"""
