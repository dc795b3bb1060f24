"""Policies. One package per architecture."""
