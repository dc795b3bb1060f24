"""The policy model: maps images and tokens to hidden states, logits or log-probs.

Its parts run in the named scopes `vision`, `text` and `log_probs`, by which profiles and `mmsr1
plan` tell them apart in a compiled program, in both passes.
"""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from mmsr1_jax.config.choices import Attention
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import family_of
from mmsr1_jax.models.image_rows import ImageRows
from mmsr1_jax.models.layers import unstack
from mmsr1_jax.models.output_head import head_logits, token_statistics
from mmsr1_jax.models.sharding import constrain
from mmsr1_jax.models.text import TextDecoder
from mmsr1_jax.utils.arrays import AnyArray


class Rows(flax.struct.PyTreeNode):
    """Rows of packed conversations with their images. Rows are independent of each other.

    Attributes:
      tokens: int32[B, T]. Token ids.
      positions: int32[B, 3, T]. Positions from `mrope_positions`, starting anew in each
        conversation.
      segment_ids: int32[B, T]. Index of each token's conversation in its row, from 1; 0 for
        padding.
      prefix_ids: int32[B, T]. Index of the segment that precedes each token's segment: its tokens
        are visible as well; 0 for none. None: no segment has one.
      image_index: int32[B, T]. Index of the merged image token that replaces an image placeholder
        (from `pack_images`); -1 for text.
      images: Images of the rows, or None if no row has any.
      single_segment: Promise that each row is one conversation, padded at the end.
    """

    tokens: Int32[AnyArray, "B T"]
    positions: Int32[AnyArray, "B 3 T"]
    segment_ids: Int32[AnyArray, "B T"]
    image_index: Int32[AnyArray, "B T"]
    images: ImageRows | None = None
    prefix_ids: Int32[AnyArray, "B T"] | None = None
    single_segment: bool = flax.struct.field(pytree_node=False, default=False)


class Policy(nnx.Module):
    """Vision tower of the config's family, and text decoder.

    Args:
      config: Model configuration.
      rngs: Random number generators for the initial parameters.
      param_dtype: Dtype of the parameters.
      dtype: Dtype of the computation; norms, rotary embedding, softmax and log-probs use float32.
      attention: Name of an implementation in `models.attention`.
      remat: Rematerialisation of the layers: `none`, `dots` or `full`, see `scan_layers`.
      logprob_chunk: Number of tokens per row whose logits over the whole vocabulary take as much
        memory as those that are materialised at a time, see `output_head`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
        attention: Attention = "auto",
        remat: str = "none",
        logprob_chunk: int = 512,
    ):
        self.vision = family_of(config).tower(config.vision, rngs=rngs, dtype=param_dtype)
        self.text = TextDecoder(config.text, rngs=rngs, dtype=param_dtype)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.attention: Attention = attention
        self.remat = remat
        self.logprob_chunk = logprob_chunk

    def unstack(self, *, vision: bool) -> None:
        """Separate the layers, for inference; see `layers.unstack`.

        Args:
          vision: Whether to separate those of the vision tower too. As a scan it compiles several
            times as fast, and on a CPU it computes much for each byte of its weights.
        """
        self.text.layers = unstack(self.text.layers)
        if vision:
            self.vision.blocks = unstack(self.vision.blocks)
        for layer in self.text.layers:
            layer.mlp.separate = True

    def encode_images(self, images: ImageRows) -> Float[jax.Array, "B M image_D"]:
        """Return the merged tokens of each row's images, float[B, M, image_D], in slot order.

        A token consists of its embedding and its DeepStack features, `VisionConfig.token_width`
        values in all.
        """
        with jax.named_scope("vision"):
            return self.vision(images, self.dtype, implementation=self.attention, remat=self.remat)

    def embed(
        self,
        tokens: Int32[AnyArray, "B T"],
        image_index: Int32[AnyArray, "B T"],
        image_tokens: Float[jax.Array, "*B M image_D"] | None,
    ) -> tuple[Float[jax.Array, "B T D"], Float[jax.Array, "deep B T D"] | None]:
        """Return token embeddings, with image tokens in place of placeholders.

        Args:
          tokens: int32[B, T]. Token ids.
          image_index: int32[B, T]. Index of the image token at each placeholder; -1 for text.
          image_tokens: Result of `encode_images`, float[B, M, image_D]; or the tokens that all rows
            share, float[M, image_D]; None if no row has an image.

        Returns:
          Embeddings, float[B, T, D], and the DeepStack features of the first `deep` layers,
          float[deep, B, T, D], 0 at text; None if the tower has none.
        """
        x = self.text.embed(tokens, self.dtype)
        if image_tokens is None:
            return x, None
        is_image, index = image_index[..., None] >= 0, jnp.maximum(image_index, 0)
        if image_tokens.ndim == 2:
            image_x = jnp.take(image_tokens, index, axis=0)
        else:
            image_x = jnp.take_along_axis(image_tokens, index[..., None], axis=1)
        x = jnp.where(is_image, image_x[..., : x.shape[-1]], x)
        if not self.config.vision.deepstack_layers:
            return x, None
        features = jnp.where(is_image, image_x[..., x.shape[-1] :], 0)
        deepstack = jnp.stack(jnp.split(features, len(self.config.vision.deepstack_layers), -1))
        return x, constrain(deepstack, None, "batch", None, None)

    def __call__(
        self, rows: Rows, image_tokens: Float[jax.Array, "B M image_D"] | None = None
    ) -> tuple[Float[jax.Array, "B T D"], dict[str, jax.Array | None]]:
        """Compute the hidden states of all tokens, before the output head.

        Args:
          rows: Input rows.
          image_tokens: float[B, M, image_D], result of `encode_images`; computed from
            `rows.images` if None.

        Returns:
          Hidden states after the final norm, float[B, T, D], and a dictionary of named
          intermediates (`image_tokens`).
        """
        if image_tokens is None and rows.images is not None:
            image_tokens = self.encode_images(rows.images)
        with jax.named_scope("text"):
            x, deepstack = self.embed(rows.tokens, rows.image_index, image_tokens)
            hidden = self.text(
                x,
                rows.positions,
                rows.segment_ids,
                rows.prefix_ids,
                deepstack=deepstack,
                single_segment=rows.single_segment,
                implementation=self.attention,
                remat=self.remat,
            )
        return hidden, {"image_tokens": image_tokens}

    def logits(self, hidden: Float[jax.Array, "B T D"]) -> Float32[jax.Array, "B T V"]:
        """Return logits of a few tokens, float32[B, T, V]. Use `token_logprobs` for full rows."""
        logits = head_logits(hidden, self.text.head_table)
        return constrain(logits, "batch", None, "vocab")

    def token_logprobs(
        self, rows: Rows, image_tokens: Float[jax.Array, "B M image_D"] | None = None
    ) -> Float32[jax.Array, "B T"]:
        """Return log p(token t | preceding tokens of its segment), float32[B, T].

        The value is 0 at the first token of a segment and at padding.
        """
        hidden, _ = self(rows, image_tokens)
        ids = rows.segment_ids
        # Position t predicts token t + 1; the last column predicts nothing and is dropped.
        targets = jnp.roll(rows.tokens, -1, axis=1)
        table = self.text.head_table
        logprobs, _ = token_statistics(hidden, table, targets, chunk=self.logprob_chunk)
        logprobs = jnp.roll(logprobs, 1, axis=1).at[:, 0].set(0.0)
        has_previous = (ids == jnp.roll(ids, 1, axis=1)) & (ids > 0)
        return jnp.where(has_previous, logprobs, 0.0)

    def statistics(
        self,
        rows: Rows,
        logit_columns: Int32[AnyArray, "B C"],
        targets: Int32[AnyArray, "B C"],
        *,
        temperature: float = 1.0,
        image_tokens: Float[jax.Array, "B M image_D"] | None = None,
    ) -> tuple[Float32[jax.Array, "B C"], Float32[jax.Array, "B C"]]:
        """Return log-probs of selected tokens and entropies of their predictive distributions.

        Args:
          rows: Input rows.
          logit_columns: int32[B, C]. Columns of `rows` whose logits predict the targets.
          targets: int32[B, C]. Ids of the tokens to score.
          temperature: Sampling temperature, greater than 0.
          image_tokens: Precomputed image tokens, see `__call__`.

        Returns:
          Log-probs, float32[B, C], and entropies in nats, float32[B, C].
        """
        hidden, _ = self(rows, image_tokens)
        with jax.named_scope("log_probs"):
            hidden = jnp.take_along_axis(hidden, logit_columns[..., None], axis=1)
        return token_statistics(
            hidden,
            self.text.head_table,
            targets,
            chunk=self.logprob_chunk,
            temperature=temperature,
        )
