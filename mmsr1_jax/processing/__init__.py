"""From messages and image files to model inputs: tokenizer, image processor, batches.

Used by whatever runs a model or prepares input for one.
"""
