"""Store of encoded images on the device, shared by all episodes of an engine.

The store is an array of image tokens, float[M, image_D]. An image occupies as many of its rows
("slots") as it has merged tokens, in any order, and is found by the digest of its patches. A chunk
that is written into a lane names the slots of its placeholders, so that extending is one program
per length, whatever the number of images. The least recently used images are evicted.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.image_rows import ImageRows, num_windows, pack_images
from mmsr1_jax.processing.batching import TooLongError, smallest_bucket
from mmsr1_jax.processing.images import Patches

# Encodes packed images and writes their tokens to slots, int32[B, M].
Encode = Callable[[ImageRows, np.ndarray], None]


def check_image(
    image: Patches, model: ModelConfig, rollout: settings.Rollout, windows: Sequence[int]
) -> None:
    """Raise TooLongError if an engine with these settings cannot hold an image.

    Args:
      image: Patches of the image.
      model: Model configuration.
      rollout: Settings of the engine.
      windows: Image window buckets, `buckets.image_windows`.
    """
    smallest_bucket(
        "image windows", num_windows([image.grid], model.vision), windows, "buckets.image_windows"
    )
    size = len(image.values) // model.vision.merge_size**2
    # A chunk may contain parts of two such images beside complete ones.
    max_size = (rollout.image_cache_tokens - rollout.prefill_buckets[-1]) // 2
    if size > max_size:
        raise TooLongError(
            f"an image of {size} tokens is too large: "
            f"rollout.image_cache_tokens={rollout.image_cache_tokens} allows {max_size}"
        )


class ImageCache:
    """Allocation of the store's slots, and encoding of images that are not in it.

    Args:
      model: Model configuration.
      rollout: Settings of the engine.
      windows: Image window buckets, `buckets.image_windows`.
      encode: Program that encodes images and writes their tokens to the store.

    Attributes:
      num_encoded: Number of images encoded since the store was created.
    """

    def __init__(
        self,
        model: ModelConfig,
        rollout: settings.Rollout,
        windows: Sequence[int],
        encode: Encode,
    ):
        self._vision, self._windows, self._encode = model.vision, windows, encode
        self._capacity, self._encode_windows = rollout.image_cache_tokens, rollout.encode_windows
        self.num_encoded = 0
        self.clear()

    def clear(self) -> None:
        """Discard all images, for example because new parameters were loaded."""
        # Slots of each stored image by digest, the least recently used first.
        self._slots: OrderedDict[str, np.ndarray] = OrderedDict()
        self._free = list(range(self._capacity))

    def warm_up(self) -> None:
        """Compile the encoder for all window buckets by running it on padding."""
        for windows in self._windows:
            self._encode_batch(windows, [])

    def fits(self, images: Sequence[Patches]) -> bool:
        """Return whether the store can hold all of these images at once."""
        distinct = {image.digest: image for image in images}
        return sum(map(self._size, distinct.values())) <= self._capacity

    def slots(self, images: Sequence[Sequence[Patches]]) -> list[np.ndarray]:
        """Return the slots of each chunk's image tokens, int32[M], image after image.

        Images that are not in the store are encoded first, each once.

        Args:
          images: Images of each chunk, which fit into the store together.
        """
        required = {image.digest: image for chunk in images for image in chunk}
        missing = [image for digest, image in required.items() if digest not in self._slots]
        for digest in required:
            if digest in self._slots:
                self._slots.move_to_end(digest)
        by_windows: dict[int, list[tuple[Patches, np.ndarray]]] = {}
        for image in missing:
            windows = num_windows([image.grid], self._vision)
            bucket = smallest_bucket(
                "image windows", windows, self._windows, "buckets.image_windows"
            )
            by_windows.setdefault(bucket, []).append((image, self._allocate(self._size(image))))
        for windows, allocated in by_windows.items():
            rows = self._rows(windows)
            for first in range(0, len(allocated), rows):
                batch = allocated[first : first + rows]
                self._encode_batch(windows, batch)
                self._slots |= {image.digest: slots for image, slots in batch}
        self.num_encoded += len(missing)
        empty = np.zeros(0, np.int32)
        return [
            np.concatenate([empty, *(self._slots[image.digest] for image in chunk)])
            for chunk in images
        ]

    def _allocate(self, size: int) -> np.ndarray:
        """Return free slots, int32[size], evicting images if there are too few."""
        while len(self._free) < size:
            self._free += self._slots.popitem(last=False)[1].tolist()
        return np.array([self._free.pop() for _ in range(size)], np.int32)

    def _size(self, image: Patches) -> int:
        return len(image.values) // self._vision.merge_size**2

    def _rows(self, windows: int) -> int:
        """Return the number of rows in an encoder batch of one window bucket."""
        return max(1, self._encode_windows // windows)

    def _encode_batch(self, windows: int, batch: Sequence[tuple[Patches, np.ndarray]]) -> None:
        """Encode images of one window bucket, and write their tokens to the given slots."""
        rows = [[(image.values, image.grid)] for image, _ in batch]
        rows += [[]] * (self._rows(windows) - len(batch))
        inputs, indices = pack_images(rows, windows, self._vision)
        M = inputs.patches.shape[1] // self._vision.merge_size**2
        slots = np.full((len(rows), M), self._capacity, np.int32)  # out of range: padding
        for row, (_, image_slots) in enumerate(batch):
            slots[row, indices[row]] = image_slots
        self._encode(inputs, slots)
