"""Rollouts: decoding that pauses at search tags and resumes with the search results."""
