"""MMSearch-R1 in JAX: reinforcement learning that teaches a multimodal model when to search."""
