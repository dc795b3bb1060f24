"""The policy: pictures and tokens in, hidden states, logits or log-probs out."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from mmsr1_jax.models.qwen2_5_vl.config import ModelConfig
from mmsr1_jax.models.qwen2_5_vl.text import (
    TextDecoder,
    head_logits,
    token_logprobs,
    token_statistics,
)
from mmsr1_jax.models.qwen2_5_vl.vision import ImageRows, VisionTower
from mmsr1_jax.models.sharding import constrain


@flax.struct.dataclass
class Rows:
    """Rows of packed conversations with their images; everything of a row is in that row.

    Attributes:
      tokens: int32[B, T].
      positions: int32[B, 3, T], from `mrope_positions`, counted anew in each conversation.
      segment_ids: int32[B, T]: which conversation of the row, from 1; 0 for padding.
      image_index: int32[B, T]: for an image placeholder, which of the row's merged image tokens it
        stands for (from `pack_images`); -1 for text.
      images: the row's pictures, or None where no row has any.
      single_segment: a promise that each row is one conversation, padded at the end.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    image_index: jax.Array
    images: ImageRows | None = None
    single_segment: bool = flax.struct.field(pytree_node=False, default=False)


class Qwen2_5_VL(nnx.Module):
    """Qwen2.5-VL (arXiv 2502.13923).

    Args of the constructor:
      config: its shape.
      rngs: random numbers for fresh parameters.
      param_dtype: dtype in which parameters are held.
      dtype: dtype of the computation; norms, rotations, softmax and log-probs are float32.
      attention: an implementation of `models.attention`.
      remat: what the backward pass keeps of a layer: `none`, `dots` or `full`.
      logprob_chunk: tokens of each row whose logits are held at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        dtype=jnp.float32,
        attention: str = "auto",
        remat: str = "none",
        logprob_chunk: int = 512,
    ):
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=param_dtype)
        self.text = TextDecoder(config.text, rngs=rngs, dtype=param_dtype)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.attention = attention
        self.remat = remat
        self.logprob_chunk = logprob_chunk

    def encode_images(self, images: ImageRows) -> jax.Array:
        """float[B, M, D]: the merged tokens of each row's images, in slot order."""
        return self.vision(images, self.dtype, implementation=self.attention, remat=self.remat)

    def embed(self, rows: Rows, image_tokens: jax.Array | None) -> jax.Array:
        """float[B, T, D]: token embeddings, image tokens in the place of placeholders."""
        x = self.text.embed(rows.tokens, self.dtype)
        if image_tokens is None:
            return x
        index = jnp.maximum(rows.image_index, 0)[..., None]
        pictures = jnp.take_along_axis(image_tokens, index, axis=1)
        return jnp.where(rows.image_index[..., None] >= 0, pictures, x)

    def __call__(
        self, rows: Rows, image_tokens: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Hidden states of every token, before the output head.

        Args:
          rows: the tokens.
          image_tokens: the result of `encode_images` where it is at hand; else it is computed.

        Returns:
          float[B, T, D] after the final norm, and named intermediates (`image_tokens`).
        """
        if image_tokens is None and rows.images is not None:
            image_tokens = self.encode_images(rows.images)
        hidden = self.text(
            self.embed(rows, image_tokens),
            rows.positions,
            rows.segment_ids,
            single_segment=rows.single_segment,
            implementation=self.attention,
            remat=self.remat,
        )
        return hidden, {"image_tokens": image_tokens}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[B, T, V]. For a few tokens only: see `token_logprobs` for whole rows."""
        logits = head_logits(hidden, self.text.head_table)
        return constrain(logits, "batch", None, "vocab")

    def token_logprobs(self, rows: Rows, image_tokens: jax.Array | None = None) -> jax.Array:
        """float32[B, T]: log p(token t | the tokens before it in its segment).

        0 where there is none: at the first token of a segment and at padding.
        """
        hidden, _ = self(rows, image_tokens)
        ids = rows.segment_ids
        # Position t predicts token t + 1; the last column predicts nothing and is dropped.
        targets = jnp.roll(rows.tokens, -1, axis=1)
        logprobs = token_logprobs(hidden, self.text.head_table, targets, chunk=self.logprob_chunk)
        logprobs = jnp.roll(logprobs, 1, axis=1).at[:, 0].set(0.0)
        has_previous = (ids == jnp.roll(ids, 1, axis=1)) & (ids > 0)
        return jnp.where(has_previous, logprobs, 0.0)

    def statistics(
        self,
        rows: Rows,
        before: jax.Array,
        targets: jax.Array,
        *,
        temperature: float = 1.0,
        image_tokens: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probs of some tokens, and the entropies of what they were drawn from.

        Args:
          rows: all tokens.
          before: int32[B, C]: columns of `rows`; what each predicts is asked for.
          targets: int32[B, C]: the tokens whose log-probs are wanted.
          temperature: of sampling, over 0.
          image_tokens: see `__call__`.

        Returns:
          float32[B, C] twice.
        """
        hidden, _ = self(rows, image_tokens)
        hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
        return token_statistics(
            hidden,
            self.text.head_table,
            targets,
            chunk=self.logprob_chunk,
            temperature=temperature,
        )
