"""Large files of questions are read and written in small parts."""

import subprocess
import sys

from pyarrow import parquet

from mmsr1_jax.data import (
    write_parquet,
)
from tests.question_files import (
    png,
    question,
    row,
    write_rows,
)

_PEAK = """
import sys, pyarrow
from mmsr1_jax.data import QuestionSource, batches
peaks = []
for path in sys.argv[1:]:
    source = QuestionSource(path)
    peaks.append(pyarrow.default_memory_pool().max_memory())
    stream = batches(source, 4, seed=0)
    seen = sum(len(image) for _ in range(5) for q in next(stream) for image in q.images)
    for q in source:
        seen += sum(map(len, q.images))
    stream.close()
    peaks.append(pyarrow.default_memory_pool().max_memory())
    assert seen == 220 * len(q.images[0])
print(*peaks)
"""


def test_peak_memory_is_bounded_for_large_files(tmp_path):
    # 200 rows of 200 kB: 40 MB, in small row groups, or in one row group with small pages.
    image = png(0, (258, 258), "bmp")
    rows = [row(i, images=[{"bytes": image, "path": None}]) for i in range(200)]
    paths = []
    for name, options in (("groups", {"row_group_size": 10}), ("pages", {"write_batch_size": 4})):
        paths.append(tmp_path / f"{name}.parquet")
        write_rows(paths[-1], rows, use_dictionary=False, compression="none", **options)
        assert paths[-1].stat().st_size > 39e6
    assert parquet.ParquetFile(paths[0]).metadata.num_row_groups == 20
    assert parquet.ParquetFile(paths[1]).metadata.num_row_groups == 1
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *paths], capture_output=True, text=True, check=True
    )
    opened, *peaks = map(int, done.stdout.split())
    assert opened < 2e6  # no image is read when a file is opened
    assert max(peaks) < 20e6


def test_written_files_have_small_row_groups(tmp_path):
    image = png(0, (258, 258), "bmp")
    questions = (question(i, images=(image,)) for i in range(200))
    write_parquet(tmp_path / "a.parquet", questions)
    metadata = parquet.ParquetFile(tmp_path / "a.parquet").metadata
    assert metadata.num_row_groups == 3
    assert sum(metadata.row_group(i).num_rows for i in range(3)) == 200
