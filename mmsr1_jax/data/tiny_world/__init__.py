"""The embedded default task: a small made-up world, its questions, and where answers are found.

    world       landmarks with emblems and facts, and what a policy remembers of them
    emblems     drawing them, and photos of them
    pages       pages and pictures for the local index
    questions   of four kinds, and demonstrations for the warm start
    tokenizer   of the tiny policy, and its prompts

Everything is drawn from one seed.
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
