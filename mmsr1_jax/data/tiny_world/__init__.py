"""Embedded default task: a small synthetic world, its questions and its search index.

    world       landmarks with emblems and facts, and what a warm-started policy remembers of them
    emblems     drawings of the emblems, and photos of them
    pages       pages and images for the local index
    questions   questions of four categories, and demonstrations for the warm start
    tokenizer   tokenizer and prompts of the tiny policy

Everything is generated from one seed.
"""

from mmsr1_jax.data.tiny_world.pages import pages, write_index
from mmsr1_jax.data.tiny_world.questions import demonstrations, memories, practice, questions
from mmsr1_jax.data.tiny_world.tokenizer import POLICY, PROMPTS, train_tokenizer
from mmsr1_jax.data.tiny_world.world import Landmark, World

__all__ = [
    "POLICY",
    "PROMPTS",
    "Landmark",
    "World",
    "demonstrations",
    "memories",
    "pages",
    "practice",
    "questions",
    "train_tokenizer",
    "write_index",
]
