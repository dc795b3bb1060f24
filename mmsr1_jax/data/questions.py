"""The questions of parquet files by number, and the batches of a training run.

All but the pictures is read and checked when the files are opened. Pictures are read when a
question is asked for, a page of the file at a time: a few pictures where `write_parquet` made it,
up to 1,024 rows where pyarrow did with its defaults.
"""

import dataclasses
import hashlib
import itertools
import json
import operator
import pathlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain

from mmsr1_jax.data.parquet import BadRow, DataError, Question, QuestionFile, find_files
from mmsr1_jax.processing.image_files import DEFAULT_MAX_FILE_PIXELS, ImageError, image_size
from mmsr1_jax.processing.images import ImageProcessor


class QuestionSource:
    """The questions of parquet files, by number, in the order of files and rows.

    Rows that cannot be used are named on stderr, once, and listed in `bad`. Those whose text is bad
    have no number. Whether a picture is bad shows when it is first read: then the next number with
    good pictures (after the last, the first) takes the place, in `read` and `[]`. So what stands
    at a number depends on the files alone, not on what was read before. Pictures are decoded once
    to see whether they can be; what is handed out is the file's bytes.

    Safe to be used from several threads. Files must not change while they are in use.

    Args of the constructor:
      where: see `parquet.find_files`.
      image_roots: see `QuestionFile.pictures`.
      max_bad_rows: with more bad rows than this, DataError is raised.
      max_file_pixels: see `images.open_image`.
    """

    def __init__(
        self,
        where: str | pathlib.Path | Sequence[str | pathlib.Path],
        *,
        image_roots: Sequence[str] = (),
        max_bad_rows: int = 100,
        max_file_pixels: int = DEFAULT_MAX_FILE_PIXELS,
    ):
        """Raises DataError: no such file, one that is not parquet or lacks a column, no question
        that can be used, or too many that cannot."""
        self.bad: list[BadRow] = []
        self._image_roots = tuple(image_roots)
        self._max_bad_rows, self._max_file_pixels = max_bad_rows, max_file_pixels
        self._lock = threading.Lock()
        self._sound: set[int] = set()  # numbers whose pictures were decoded once
        self._unusable: set[int] = set()  # numbers whose pictures cannot be
        paths = find_files(where)
        self._files = [QuestionFile.of(path) for path in paths]  # all, before any is read
        self._questions: list[Question] = []  # without their pictures
        self._file_of: list[int] = []
        for number, file in enumerate(self._files):
            for question in file.texts():
                if isinstance(question, BadRow):
                    self._report(question)
                else:
                    self._questions.append(question)
                    self._file_of.append(number)
        if not self._questions:
            raise DataError(f"{', '.join(map(str, paths))}: no question that can be used")

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, number: int) -> Question:
        """One question. `read` is better for several: it goes over a row group once for all."""
        return self.read([operator.index(number)])[0]

    def __iter__(self) -> Iterator[Question]:
        """All questions in order, those with bad pictures left out; a few rows are in memory."""
        return (question for _, question in self._load(range(len(self))))

    def read(self, numbers: Sequence[int]) -> list[Question]:
        """Questions by number, in the order asked for; a number may come twice.

        Raises:
          IndexError: a number that is none.
          DataError: too many bad rows, no good one left, or a file that cannot be read any more.
        """
        for number in numbers:
            if not -len(self) <= number < len(self):
                raise IndexError(f"question {number} of {len(self)}")
        loaded: dict[int, Question] = {}
        while True:
            chosen = [self._usable(number) for number in numbers]
            missing = set(chosen) - loaded.keys()
            if not missing:
                return [loaded[number] for number in chosen]
            loaded.update(self._load(sorted(missing)))

    def fingerprint(self) -> str:
        """By which the same questions in the same order are known, in whatever folder."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self._questions:
            parts = [question.question, question.source, question.category, *question.answers]
            digest.update(json.dumps(parts).encode())
        return digest.hexdigest()

    def _usable(self, number: int) -> int:
        """The number, or the next one whose pictures are not known to be bad."""
        for candidate in range(number, number + len(self)):
            if candidate % len(self) not in self._unusable:
                return candidate % len(self)
        raise DataError(f"{self._files[0].path} ..: no row has pictures that can be used")

    def _load(self, numbers: Iterable[int]) -> Iterator[tuple[int, Question]]:
        """Ascending numbers and their questions with pictures; bad ones are reported, left out."""

        def place(number: int) -> tuple[int, int]:
            file = self._file_of[number]
            return file, self._files[file].group_of(self._questions[number].row)

        for (file, group), members in itertools.groupby(numbers, place):
            wanted = {self._questions[number].row: number for number in members}
            pictures = self._files[file].pictures(group, wanted.keys(), self._image_roots)
            for row, images in pictures:
                number = wanted[row]
                if not isinstance(images, BadRow) and number not in self._sound:
                    images = self._checked(images, self._questions[number])
                if isinstance(images, BadRow):
                    self._unusable.add(number)
                    self._report(images)
                else:
                    self._sound.add(number)
                    yield number, dataclasses.replace(self._questions[number], images=images)

    def _checked(self, images: tuple[bytes, ...], question: Question) -> tuple[bytes, ...] | BadRow:
        for place, image in enumerate(images):
            try:
                size = image_size(image, max_pixels=self._max_file_pixels)
                ImageProcessor().target_size(*size)  # refuses too long ones
            except ImageError as error:
                return BadRow(question.file, question.row, f"images[{place}]", str(error))
        return images

    def _report(self, bad: BadRow) -> None:
        with self._lock:
            if bad in self.bad:  # two threads met it
                return
            self.bad.append(bad)
            count = len(self.bad)
        print(f"{bad}; left out", file=sys.stderr)
        if count > self._max_bad_rows:
            raise DataError(
                f"rows that cannot be used: {count}, more than "
                f"config.data.max_bad_rows={self._max_bad_rows}; the last one is {bad}"
            )


class Batches:
    """An endless iterator over the questions of a process, step by step; see `batches`."""

    def __init__(self, source: QuestionSource, steps: grain.MapDataset, made_with: dict[str, Any]):
        self._made_with = made_with | {"questions": len(source), "data": source.fingerprint()}
        # One thread prepares the next step: so bad rows are met in a fixed order.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        self._iterator = iter(steps.to_iter_dataset(options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> list[Question]:
        """The next step's questions. Raises DataError, see `QuestionSource.read`."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position after the last step that was handed out, as plain data for JSON. It is the
        same in all processes, whatever their number."""
        return self._made_with | {"position": self._iterator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
          DataError: it was saved with another seed, step size or data; the message names it.
        """
        if not isinstance(state, dict) or "position" not in state:
            raise DataError(f"not a position in the data: {state!r}")
        for field, value in self._made_with.items():
            if state.get(field) != value:
                raise DataError(
                    f"the position in the data was saved with {field}={state.get(field)!r}, this "
                    f"run has {value!r}; a run is continued with the same data and settings"
                )
        try:
            self._iterator.set_state(state["position"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"not a position in the data: {state!r} ({error!r})") from None

    def close(self) -> None:
        """Stops reading ahead."""
        self._iterator.close()


def batches(
    source: QuestionSource,
    prompts_per_step: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> Batches:
    """The questions of a training run.

    There is one sequence for all processes: the questions in an order drawn for each epoch, epoch
    after epoch. A step takes the next `prompts_per_step` of it, and a process of these the ones at
    `process::processes`. So what a step holds depends on source, seed and step alone. A question
    whose pictures turn out bad gives its place to another (`QuestionSource`), which is thus seen
    twice in that epoch; no step is ever short.

    Args:
      source: may hold fewer questions than a step; then they come again in it.
      prompts_per_step: of all processes together.
      seed: in [0, 2^32).
      process, processes: number of this process, and how many there are.

    Raises:
      DataError: the prompts of a step cannot be divided among the processes.
    """
    if prompts_per_step < 1 or prompts_per_step % processes:
        raise DataError(
            f"prompts_per_step={prompts_per_step} must be a positive multiple of the number of "
            f"processes, {processes}"
        )
    if not 0 <= process < processes:
        raise DataError(f"process={process} must be in [0, {processes})")
    numbers = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    steps = numbers[process::processes].batch(prompts_per_step // processes, batch_fn=list)
    made_with = {"seed": seed, "prompts_per_step": prompts_per_step}
    return Batches(source, steps.map(source.read), made_with)


def validation(source: QuestionSource, limit: int | None = None) -> Iterator[Question]:
    """The first `limit` questions in order (None: all); those with bad pictures are left out."""
    return itertools.islice(source, limit)
