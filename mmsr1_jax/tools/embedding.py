"""Image embeddings by a policy's vision tower, for the local index (`local_index.py`).

The embedding of an image is the mean of its merged visual tokens, normalised to length 1, so images
that look alike to the tower lie close together. Only the tower is loaded. Parameters and arithmetic
are float32, so that an index can be built on one kind of machine and searched on another.

One program is compiled for each number of windows in a short table. It embeds a single image at a
time, so an embedding does not depend on other images.
"""

import dataclasses
import hashlib
import json
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx

from mmsr1_jax.models import sharding
from mmsr1_jax.models.checkpoint import load_vision
from mmsr1_jax.models.image_rows import ImageRows, num_windows, pack_images
from mmsr1_jax.processing.images import ImageError, ImageProcessor

# Largest image that the published script shows to the policy. The released settings would allow 14
# times as many pixels, which does not make an image easier to recognise.
MAX_PIXELS = 2 * 672 * 672
# An image of MAX_PIXELS takes at most 96 windows of 112 x 112, for any shape (84 x 10,696 does).
WINDOWS = (16, 32, 64, 128)


class Embedder:
    """Vision tower of a Hugging Face model directory, on one device. Thread-safe.

    Args:
      directory: Directory with `config.json`, `preprocessor_config.json` and safetensors. Images
        are resized and normalised as configured there, but to at most `MAX_PIXELS`.

    Attributes:
      fingerprint: 32 hex digits that identify the tower's parameters and shape and the image
        preprocessing. They do not depend on the path of the directory or on the text decoder.
    """

    def __init__(self, directory: str | pathlib.Path):
        """Load the tower. Raises ConfigError, CheckpointError or ImageError for invalid files."""
        images = ImageProcessor.from_directory(directory)
        self._images = images.with_limits(None, min(images.max_pixels, MAX_PIXELS))
        self._mesh = sharding.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        tower: Any = load_vision(directory, mesh=self._mesh, param_dtype=jnp.float32)
        self._config = tower.config
        for field in ("patch_size", "temporal_patch_size", "merge_size"):
            value, required = getattr(images, field), getattr(tower.config, field)
            if value != required:
                raise ImageError(
                    f"{directory}: preprocessor_config.json has {field}={value}, but the vision "
                    f"tower has {required}"
                )
        graph, self._params = nnx.split(tower)
        self.fingerprint = _fingerprint(self._images, tower)
        self._lock = threading.Lock()

        @jax.jit
        def program(params: nnx.State, images: ImageRows) -> jax.Array:
            with jax.default_matmul_precision("highest"):  # full float32
                tokens = nnx.merge(graph, params)(images, jnp.float32)
                tokens = tokens[..., : self._config.out_hidden_size]  # without DeepStack features
            unit = self._config.merge_size**2
            return mean_direction(tokens[0], jnp.asarray(images.segment_ids[0, ::unit] > 0))

        self._program = program

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the embedding of an RGB image, float32[D], of length 1.

        Raises:
          ImageError: The image takes too many windows, or its embedding is not finite.
        """
        patches = self._images(image)
        num_windows_needed = num_windows([patches.grid], self._config)
        windows = next((n for n in WINDOWS if num_windows_needed <= n), None)
        if windows is None:  # a tower with smaller windows than the released ones
            raise ImageError(
                f"{image.width}x{image.height} pixels take {num_windows_needed} windows of the "
                f"vision tower, more than {WINDOWS[-1]}; set a smaller max_pixels in "
                "preprocessor_config.json"
            )
        vector = self._run(windows, patches.values, patches.grid)
        if not np.isfinite(vector).all():
            raise ImageError(
                "the embedding of the image is not finite; check the parameters of the model"
            )
        return vector

    def warm_up(self) -> None:
        """Compile every program by running it on one black token."""
        side = self._config.merge_size
        black = np.zeros((side * side, self._config.patch_dim), np.float32)
        for windows in WINDOWS:
            self._run(windows, black, (1, side, side))

    def _run(self, windows: int, patches: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
        """Return the embedding, float32[D], of float32[P, patch_dim] patches."""
        images, _ = pack_images([[(patches, grid)]], windows, self._config)
        # The lock ensures that each program is compiled once, and bounds device memory. The mesh is
        # set explicitly so that the caller's mesh does not enter the compiled program.
        with self._lock, jax.set_mesh(self._mesh):
            return np.asarray(self._program(self._params, images))


def mean_direction(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of the tokens in a mask, normalised to length 1.

    Args:
      tokens: float[M, D] visual tokens.
      mask: bool[M], False for padding.

    Returns:
      float[D] unit vector.
    """
    mean = jnp.where(mask[:, None], tokens, 0).sum(axis=0) / mask.sum()
    return mean / jnp.linalg.norm(mean)


def _fingerprint(images: ImageProcessor, tower: Any) -> str:
    settings = dataclasses.asdict(images)
    for field in ("resample", "rescale_factor"):  # added later; keeps older indexes valid
        if settings[field] == getattr(ImageProcessor, field):
            del settings[field]
    description = [settings, dataclasses.asdict(tower.config)]
    digest = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16)
    for path, parameter in nnx.to_flat_state(nnx.state(tower, nnx.Param)):
        digest.update("/".join(map(str, path)).encode())
        digest.update(np.ascontiguousarray(parameter.get_value()).data)
    return digest.hexdigest()
