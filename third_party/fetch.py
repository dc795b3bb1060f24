"""Download a data set or a model from the Hugging Face Hub, and verify it.

    python third_party/fetch.py NAME [--out=DIR] [--revision=COMMIT]
    python third_party/fetch.py                 list the available names

Files are written to DIR (default: build/NAME, which git ignores). Each is compared with the Hub's
metadata for that commit: its size, and its SHA-256 for a large file or git's own SHA-1 otherwise.
Existing files that pass are not downloaded again, so an interrupted run can be resumed. At the end,
DIR/fetched.json records the repository, the commit, and the size and SHA-256 of each file.

Repositories that require an account or consent are downloaded with the token in HF_TOKEN.
HF_ENDPOINT selects another hub.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.hf_api import RepoFile

_CHUNK = 1 << 20  # bytes of a file read at a time
_WEIGHTS = ("*.safetensors", "*.json", "*.txt", "*.jinja")  # files of a Hugging Face model


class FetchError(Exception):
    """Failed download or verification; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of a repository on the Hub.

    Attributes:
      repo: Repository ID on the Hub.
      kind: Repository type, `model` or `dataset`.
      revision: Commit to download. None if none could be determined; it must then be given.
      files: Shell patterns of paths in the repository; `*` also matches `/`.
    """

    repo: str
    kind: str
    revision: str | None
    files: tuple[str, ...]


SOURCES = {
    "qwen2.5-vl-3b": Source(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "model",
        "66285546d2b821cf421d4f5eb2576359d3770cd3",
        _WEIGHTS,
    ),
    "qwen2.5-vl-7b": Source(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "model",
        "cc594898137f460bfe9f0759e9844b3ce807cfb5",
        _WEIGHTS,
    ),
    "qwen2.5-vl-32b": Source(
        "Qwen/Qwen2.5-VL-32B-Instruct",
        "model",
        "7cfb30d71a1f4f49a57592323337a4a4727301da",
        _WEIGHTS,
    ),
    "qwen2.5-vl-72b": Source(
        "Qwen/Qwen2.5-VL-72B-Instruct",
        "model",
        "89c86200743eec961a297729e7990e8f2ddbc4c5",
        _WEIGHTS,
    ),
    **{
        f"qwen3-vl-{size}": Source(
            f"Qwen/Qwen3-VL-{size.upper()}-Instruct", "model", None, _WEIGHTS
        )
        for size in ("2b", "4b", "8b", "32b")
    },
    "mmsearch-r1-7b": Source(
        "lmms-lab/MMSearch-R1-7B",
        "model",
        "3cdec93e6db79a409aff4a4b2eadc77a5a8a1e46",
        _WEIGHTS,
    ),
    "fvqa-train": Source(
        "lmms-lab/FVQA",
        "dataset",
        "bb4a4ff4c9c3fd0382d11f5d7fccd66d0b8428b5",
        ("fvqa_train.parquet", "fvqa_train_image_search_results_cache.pkl"),
    ),
    "fvqa-test": Source(
        "lmms-lab/FVQA",
        "dataset",
        "bb4a4ff4c9c3fd0382d11f5d7fccd66d0b8428b5",
        ("fvqa_test.parquet", "fvqa_test_image_search_results_cache.pkl"),
    ),
    "mmsearch": Source(
        "CaraJ/MMSearch",
        "dataset",
        "f9616f150908dae99fc7fc6329e1af93b4854299",
        ("end2end.parquet",),
    ),
    "simplevqa": Source("m-a-p/SimpleVQA", "dataset", None, ("*.parquet",)),
    "livevqa": Source("ONE-Lab/LiveVQA-Research-Preview", "dataset", None, ("qa.json", "image/*")),
    "okvqa": Source(
        "lmms-lab/OK-VQA",
        "dataset",
        "c9f858961f4095a9aeef615057b0822cce967096",
        ("data/val2014-*.parquet",),
    ),
    "slidevqa": Source(
        "NTT-hil-insight/SlideVQA",
        "dataset",
        "e780ea258d734958befbfaed19fa059584642ca8",
        ("*test-*.parquet",),
    ),
    "mmlongbench": Source(
        "yubo2333/MMLongBench-Doc",
        "dataset",
        "38bceac8784469e70ad783dbf26c0b6ff08e0a9a",
        ("data/train-*.parquet", "documents/*.pdf"),
    ),
}


def fetch(source: Source, out: pathlib.Path, revision: str | None = None) -> str:
    """Download missing files, verify all files, and return the commit.

    Args:
      out: Output directory, laid out like the repository.
      revision: Revision to use instead of the source's own.

    Raises:
      FetchError: No revision is known, a download failed, or a file failed verification.
    """
    revision = revision or source.revision
    if revision is None:
        raise FetchError(
            f"{source.repo}: no commit is recorded here; look at its page, and give the one that "
            "you want by --revision=COMMIT"
        )
    hub = huggingface_hub.HfApi(os.environ.get("HF_ENDPOINT"))
    try:
        commit = hub.repo_info(source.repo, repo_type=source.kind, revision=revision).sha
        if re.fullmatch("[0-9a-f]{40}", revision) and commit != revision:
            raise FetchError(f"{source.repo}: asked for commit {revision}, the hub has {commit}")
        tree = hub.list_repo_tree(
            source.repo, repo_type=source.kind, revision=commit, recursive=True
        )
        files = wanted(source, [entry for entry in tree if isinstance(entry, RepoFile)])
        digests = {}
        for number, file in enumerate(files, 1):
            path = out / file.path
            label = f"[{number}/{len(files)}] {file.path}"
            if path.is_file() and not difference(path, file):
                print(f"{label}: there already")
            else:
                print(f"{label}: {file.size / 1e6:.1f} MB")
                hub.hf_hub_download(
                    source.repo,
                    file.path,
                    repo_type=source.kind,
                    revision=commit,
                    local_dir=out,
                    force_download=path.exists(),  # the existing file failed verification
                )
                if wrong := difference(path, file):
                    path.unlink()
                    raise FetchError(f"{path}: {wrong}; it was removed, try again")
            digests[file.path] = {"size": file.size, "sha256": digest(path, "sha256")}
    except errors.GatedRepoError:
        raise FetchError(
            f"{source.repo}: its owners ask for consent; give it on the page of the repository, "
            "and put a token of your account into HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise FetchError(f"{source.repo}: the hub has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise FetchError(f"{source.repo}: the hub has no such {source.kind}, or hides it") from None
    except (errors.HTTPError, OSError) as error:  # errors of huggingface_hub's HTTP library
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise FetchError(f"{source.repo}: {first}") from None
    told = {"repo": source.repo, "kind": source.kind, "revision": commit, "files": digests}
    partial = out / ".fetched.json.partial"
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out / "fetched.json")
    return commit


def wanted(source: Source, files: Sequence[RepoFile]) -> list[RepoFile]:
    """Return the files of a repository that belong to a source, sorted by path.

    Raises:
      FetchError: A pattern matches no file, or a path leads out of the directory.
    """
    for pattern in source.files:
        # A model may lack some kinds of files, but not its weights.
        optional = source.files == _WEIGHTS and pattern != _WEIGHTS[0]
        if not optional and not fnmatch.filter([file.path for file in files], pattern):
            raise FetchError(f"{source.repo}: has no file {pattern} at this revision")
    chosen = [f for f in files if any(fnmatch.fnmatchcase(f.path, p) for p in source.files)]
    for file in chosen:
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise FetchError(f"{source.repo}: has a file {file.path!r}")
    return sorted(chosen, key=lambda file: file.path)


def difference(path: pathlib.Path, file: RepoFile) -> str:
    """Return how a file differs from the Hub's metadata, or "" if it matches."""
    size = path.stat().st_size
    if size != file.size:
        return f"{size} bytes, the hub says {file.size}"
    if file.lfs is not None:
        name, said, found = "SHA-256", file.lfs.sha256, digest(path, "sha256")
    else:
        name, said = "git object", file.blob_id
        found = digest(path, "sha1", b"blob %d\0" % size)
    return "" if found == said else f"{name} {found}, the hub says {said}"


def digest(path: pathlib.Path, algorithm: str, before: bytes = b"") -> str:
    """Return the hex digest of `before` followed by the file's contents."""
    running = hashlib.new(algorithm, before)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            running.update(chunk)
    return running.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Gets a data set or a model, and checks it.")
    parser.add_argument("name", nargs="?", metavar="NAME", choices=SOURCES)
    parser.add_argument("--out", metavar="DIR", help="directory to write; default: build/NAME")
    parser.add_argument("--revision", metavar="COMMIT", help="40 hex digits, a tag or a branch")
    given = parser.parse_args(arguments)
    if given.name is None:
        for name, source in SOURCES.items():
            print(f"{name:16}{source.repo}  {source.revision or 'needs --revision'}")
        return
    source, out = SOURCES[given.name], pathlib.Path(given.out or f"build/{given.name}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        commit = fetch(source, out, given.revision)
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{source.repo} at {commit} is in {out}")


if __name__ == "__main__":
    main()
