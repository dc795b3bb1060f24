"""Pictures to vectors, by the vision tower of a policy, for the local index (`tools/local.py`).

A picture's vector is the mean of its merged visual tokens, brought to length 1; pictures that look
alike to the tower lie near each other. Only the tower is loaded. Parameters and arithmetic are
float32, so that an index can be made on one kind of machine and searched on another.

There is one program for each number of windows in a short table, and a picture has it to itself: so
its vector does not depend on what else is embedded.
"""

import dataclasses
import hashlib
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx

from mmsr1_jax.models import sharding
from mmsr1_jax.models.qwen2_5_vl.checkpoint import load_vision
from mmsr1_jax.models.qwen2_5_vl.vision import ImageRows, VisionTower, num_windows, pack_images
from mmsr1_jax.processing.images import ImageError, ImageProcessor

# The most that the published script shows to the policy. The released settings would allow 14 times
# as much, and a picture is not better known by more.
MAX_PIXELS = 2 * 672 * 672
# So many pixels take at most 125 windows of 112 x 112, whatever their shape (56 x 14,000 do).
WINDOWS = (16, 32, 64, 128)


class Embedder:
    """The vision tower of an HF directory, on one device. May be called in several threads.

    Args of the constructor:
      directory: `config.json`, `preprocessor_config.json` and safetensors. Pictures are resized and
        normalised as it says, but to `MAX_PIXELS` at most.

    Attributes:
      fingerprint: 32 hex digits that depend on the tower's parameters and shape, and on how
        pictures are prepared; not on where the directory is, nor on its text decoder.
    """

    def __init__(self, directory: str | pathlib.Path):
        """Raises ConfigError, CheckpointError or ImageError where a file of it cannot be used."""
        images = ImageProcessor.from_directory(directory)
        self._images = images.with_limits(None, min(images.max_pixels, MAX_PIXELS))
        self._mesh = sharding.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        tower = load_vision(directory, mesh=self._mesh, param_dtype=jnp.float32)
        self._config = tower.config
        for field in ("patch_size", "temporal_patch_size", "merge_size"):
            ours, model = getattr(images, field), getattr(tower.config, field)
            if ours != model:
                raise ImageError(
                    f"{directory}: the preprocessor's {field}={ours}, but the vision tower has "
                    f"{model}"
                )
        graph, self._params = nnx.split(tower)
        self.fingerprint = _fingerprint(self._images, tower)
        self._lock = threading.Lock()

        @jax.jit
        def program(params: nnx.State, images: ImageRows) -> jax.Array:
            with jax.default_matmul_precision("highest"):  # see `score`
                tokens = nnx.merge(graph, params)(images, jnp.float32)
            unit = self._config.merge_size**2
            return mean_direction(tokens[0], images.segment_ids[0, ::unit] > 0)

        self._program = program

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """The vector of an RGB picture, float32[D], of length 1.

        Raises:
          ImageError: the picture is too long, or its vector is not finite.
        """
        patches = self._images(image)
        need = num_windows(patches.grid, self._config)
        windows = next((n for n in WINDOWS if need <= n), None)
        if windows is None:  # a tower with smaller windows than the released ones
            raise ImageError(
                f"{image.width}x{image.height} pixels take {need} windows of the vision tower, "
                f"more than {WINDOWS[-1]}: preprocessor_config.json needs a smaller max_pixels"
            )
        vector = self._run(windows, patches.values, patches.grid)
        if not np.isfinite(vector).all():
            raise ImageError("the picture's embedding is not finite: check the model's parameters")
        return vector

    def warm_up(self) -> None:
        """Compiles every program, by running it on one black token."""
        side = self._config.merge_size
        black = np.zeros((side * side, self._config.patch_dim), np.float32)
        for windows in WINDOWS:
            self._run(windows, black, (1, side, side))

    def _run(self, windows: int, patches: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
        images, _ = pack_images([[(patches, grid)]], windows, self._config)
        # One at a time: a program is compiled once, and memory on the device is bounded. The mesh
        # is named so that a caller's own is not part of what is compiled.
        with self._lock, jax.set_mesh(self._mesh):
            return np.asarray(self._program(self._params, images))


def mean_direction(tokens: jax.Array, real: jax.Array) -> jax.Array:
    """float[M, D] -> float[D]: the mean of the tokens that are `real`, bool[M], at length 1."""
    mean = jnp.where(real[:, None], tokens, 0).sum(axis=0) / real.sum()
    return mean / jnp.linalg.norm(mean)


def _fingerprint(images: ImageProcessor, tower: VisionTower) -> str:
    settings = dataclasses.asdict(images)
    for field in ("resample", "rescale_factor"):  # these came later; earlier indexes stay valid
        if settings[field] == getattr(ImageProcessor, field):
            del settings[field]
    shape = [settings, dataclasses.asdict(tower.config)]
    digest = hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16)
    for path, parameter in nnx.to_flat_state(nnx.state(tower, nnx.Param)):
        digest.update("/".join(path).encode())
        digest.update(np.ascontiguousarray(parameter.get_value()))
    return digest.hexdigest()
