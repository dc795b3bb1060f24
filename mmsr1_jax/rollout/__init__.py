"""Rollouts: decoding that pauses at search tags and goes on with what came back."""
