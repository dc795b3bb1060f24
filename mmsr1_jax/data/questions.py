"""Questions of parquet files, and the batches of a training run.

Everything except images is read and validated when the files are opened. Images are read on demand,
one page of the file at a time. A page holds a few images in files from `write_parquet`, and up to
1,024 rows in files that pyarrow wrote with its defaults.
"""

import dataclasses
import hashlib
import itertools
import json
import operator
import pathlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain

from mmsr1_jax.data.parquet import BadRow, DataError, Question, QuestionFile, find_files
from mmsr1_jax.processing.image_files import DEFAULT_MAX_FILE_PIXELS, ImageError, image_size
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.utils.logs import log


class QuestionSource:
    """Questions of parquet files, indexed in the order of files and rows.

    Unusable rows are logged once and listed in `bad_rows`. Rows with invalid text have no
    index. Invalid images are detected when they are first read; `read` and `[]` then substitute
    the next question with valid images, wrapping around after the last. The question at an index
    therefore depends only on the files, not on earlier reads. Images are decoded once for
    validation; questions hold the bytes of the file.

    Thread-safe. Files must not change while they are in use.

    Args:
      paths: Files, see `parquet.find_files`.
      image_roots: Additional directories for images, see `QuestionFile.read_images`.
      max_bad_rows: Number of unusable rows above which DataError is raised.
      max_file_pixels: Maximum size of an image in pixels, see `image_files.open_image`.
    """

    def __init__(
        self,
        paths: str | pathlib.Path | Sequence[str | pathlib.Path],
        *,
        image_roots: Sequence[str] = (),
        max_bad_rows: int = 100,
        max_file_pixels: int = DEFAULT_MAX_FILE_PIXELS,
    ):
        """Open all files and read their questions without images.

        Raises:
          DataError: A file does not exist, is not parquet or lacks a column; no question is usable;
            or too many rows are unusable.
        """
        self.bad_rows: list[BadRow] = []
        self._image_roots = tuple(image_roots)
        self._max_bad_rows, self._max_file_pixels = max_bad_rows, max_file_pixels
        self._lock = threading.Lock()
        self._valid: set[int] = set()  # indices of questions whose images are valid
        self._invalid: set[int] = set()  # indices of questions whose images are not
        files = find_files(paths)
        self._files = [QuestionFile.open(path) for path in files]  # open all before reading any
        self._questions: list[Question] = []  # without their images
        self._file_of: list[int] = []
        for file_index, file in enumerate(self._files):
            for question in file.read_texts():
                if isinstance(question, BadRow):
                    self._report(question)
                else:
                    self._questions.append(question)
                    self._file_of.append(file_index)
        if not self._questions:
            raise DataError(f"{', '.join(map(str, files))}: no usable question")

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Question:
        """Return one question. For several, `read` is faster: it scans each row group only once."""
        return self.read([operator.index(index)])[0]

    def __iter__(self) -> Iterator[Question]:
        """Iterate over all questions with valid images in order, with a few rows in memory."""
        return (question for _, question in self._load(range(len(self))))

    def read(self, indices: Sequence[int]) -> list[Question]:
        """Return questions by index, in the order requested; indices may repeat.

        Raises:
          IndexError: An index is out of range.
          DataError: Too many rows are unusable, no usable row is left, or a file can no longer be
            read.
        """
        for index in indices:
            if not -len(self) <= index < len(self):
                raise IndexError(f"question {index} of {len(self)}")
        loaded: dict[int, Question] = {}
        while True:
            chosen = [self._usable(index) for index in indices]
            missing = set(chosen) - loaded.keys()
            if not missing:
                return [loaded[index] for index in chosen]
            loaded.update(self._load(sorted(missing)))

    def fingerprint(self) -> str:
        """Return a hash of the questions' text and order, independent of their folder."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self._questions:
            parts = [question.question, question.source, question.category, *question.answers]
            digest.update(json.dumps(parts).encode())
        return digest.hexdigest()

    def _usable(self, index: int) -> int:
        """Return the index, or the next one with images not known to be invalid."""
        for candidate in range(index, index + len(self)):
            if candidate % len(self) not in self._invalid:
                return candidate % len(self)
        raise DataError(f"{self._files[0].path} ..: no row has valid images")

    def _load(self, indices: Iterable[int]) -> Iterator[tuple[int, Question]]:
        """Yield ascending indices with their complete questions; report and skip invalid images."""

        def row_group(index: int) -> tuple[int, int]:
            file = self._file_of[index]
            return file, self._files[file].group_of(self._questions[index].row)

        for (file, group), members in itertools.groupby(indices, row_group):
            index_of = {self._questions[index].row: index for index in members}
            rows = self._files[file].read_images(group, index_of.keys(), self._image_roots)
            for row, images in rows:
                index = index_of[row]
                if not isinstance(images, BadRow) and index not in self._valid:
                    images = self._validate(images, self._questions[index])
                if isinstance(images, BadRow):
                    self._invalid.add(index)
                    self._report(images)
                else:
                    self._valid.add(index)
                    yield index, dataclasses.replace(self._questions[index], images=images)

    def _validate(
        self, images: tuple[bytes, ...], question: Question
    ) -> tuple[bytes, ...] | BadRow:
        for position, image in enumerate(images):
            try:
                size = image_size(image, max_pixels=self._max_file_pixels)
                ImageProcessor().target_size(*size)  # raises for extreme aspect ratios
            except ImageError as error:
                return BadRow(question.file, question.row, f"images[{position}]", str(error))
        return images

    def _report(self, row: BadRow) -> None:
        with self._lock:
            if row in self.bad_rows:  # another thread reported it
                return
            self.bad_rows.append(row)
            count = len(self.bad_rows)
        log.warning("%s; skipped", row)
        if count > self._max_bad_rows:
            raise DataError(
                f"{count} unusable rows, more than config.data.max_bad_rows={self._max_bad_rows}; "
                f"the last one is {row}"
            )


class Batches:
    """Endless iterator over the questions of a process, one step at a time; see `batches`."""

    def __init__(self, source: QuestionSource, steps: grain.MapDataset, settings: dict[str, Any]):
        self._settings = settings | {"questions": len(source), "data": source.fingerprint()}
        # A single thread prefetches the next step, so that bad rows are reported in a fixed order.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        self._iterator = iter(steps.to_iter_dataset(options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> list[Question]:
        """Return the next step's questions. Raises DataError, see `QuestionSource.read`."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Return the position after the last step returned, as data that JSON can represent.

        The state is the same in all processes, and independent of their number.
        """
        return self._settings | {"position": self._iterator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a position from `state`.

        Raises:
          DataError: The state is malformed, or was saved with a different seed, step size or data,
            which the message names.
        """
        if not isinstance(state, dict) or "position" not in state:
            raise DataError(f"not a saved data position: {state!r}")
        for field, value in self._settings.items():
            if state.get(field) != value:
                raise DataError(
                    f"the saved data position has {field}={state.get(field)!r}, but this run has "
                    f"{value!r}; resume a run with the same data and settings"
                )
        try:
            self._iterator.set_state(state["position"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"not a saved data position: {state!r} ({error!r})") from None

    def close(self) -> None:
        """Stop prefetching."""
        self._iterator.close()


def batches(
    source: QuestionSource,
    prompts_per_step: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> Batches:
    """Return an iterator over the questions of a training run.

    All processes share one sequence: the questions, reshuffled for each epoch. Each step takes the
    next `prompts_per_step` of it, and each process takes the slice `process::processes` of these.
    The contents of a step therefore depend only on source, seed and step. A question with invalid
    images is replaced by another (see `QuestionSource`), which then occurs twice in that epoch; no
    step is ever short.

    Args:
      source: Questions. If they are fewer than a step takes, they repeat within it.
      prompts_per_step: Number of questions per step, over all processes.
      seed: Seed of the shuffling, in [0, 2^32).
      process, processes: Index of this process, and number of processes.

    Raises:
      DataError: `prompts_per_step` is not a positive multiple of `processes`, or `process` is out
        of range.
    """
    if prompts_per_step < 1 or prompts_per_step % processes:
        raise DataError(
            f"prompts_per_step={prompts_per_step} must be a positive multiple of the number of "
            f"processes, {processes}"
        )
    if not 0 <= process < processes:
        raise DataError(f"process={process} must be in [0, {processes})")
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    steps = indices[process::processes].batch(
        prompts_per_step // processes, drop_remainder=True, batch_fn=list
    )
    settings = {"seed": seed, "prompts_per_step": prompts_per_step}
    return Batches(source, steps.map(source.read), settings)


def validation(source: QuestionSource, limit: int | None = None) -> Iterator[Question]:
    """Iterate over the first `limit` questions with valid images in order (None: all)."""
    return itertools.islice(source, limit)
