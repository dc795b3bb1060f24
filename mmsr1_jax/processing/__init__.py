"""Conversion of messages and image files to model inputs: tokenizer, image processor, batches.

Shared by all code that runs a model or prepares inputs for one.
"""
