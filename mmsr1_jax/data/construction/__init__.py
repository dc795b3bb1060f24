"""Construction of questions: concepts, pages and pictures, questions, checks, labels, reviews.

`pipeline` runs the stages from end to end; see `mmsr1_jax/construct.py`.
"""
