"""`third_party/fetch.py` downloads the files of a pinned commit, or reports why it cannot."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.programs import ROOT
from tests.servers import serve

COMMAND = ROOT / "third_party" / "fetch.py"
COMMIT = "c9f858961f4095a9aeef615057b0822cce967096"  # of OK-VQA, as recorded in the table
FILES = {
    "README.md": b"not requested",
    "data/val2014-00000-of-00002.parquet": b"first part" * 1000,
    "data/val2014-00001-of-00002.parquet": b"second part",
}
SMALL = "data/val2014-00001-of-00002.parquet"  # in git; the others are large files


class Hub:
    """Part of the Hugging Face hub that downloads use: revisions, trees, files."""

    def __init__(self):
        self.files, self.served, self.error = dict(FILES), [], None
        self.app = Starlette(routes=[
            Route("/api/datasets/lmms-lab/OK-VQA/revision/{revision}", self.revision),
            Route("/api/datasets/lmms-lab/OK-VQA/tree/{revision}", self.tree),
            Route("/datasets/lmms-lab/OK-VQA/resolve/{revision}/{path:path}", self.file),
        ])  # fmt: skip

    def revision(self, request):
        if self.error:
            return Response("", status_code=self.error[0], headers={"X-Error-Code": self.error[1]})
        if request.path_params["revision"] not in (COMMIT, "main"):
            return Response("", status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
        return JSONResponse({"id": "lmms-lab/OK-VQA", "sha": COMMIT, "siblings": []})

    def tree(self, request):
        assert request.path_params["revision"] == COMMIT
        entries = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
        for path, data in FILES.items():  # listed files; `self.files` are served
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
            if path != SMALL:
                sha = hashlib.sha256(data).hexdigest()
                entry |= {"oid": "1" * 40}
                entry |= {"lfs": {"oid": sha, "size": len(data), "pointerSize": 132}}
            entries.append(entry)
        return JSONResponse(entries)

    def file(self, request):
        path = request.path_params["path"]
        data = self.files[path]
        if request.method == "GET":
            self.served.append(path)
        tag = hashlib.sha256(FILES[path]).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}
        return Response(data, headers=headers)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub_server = Hub()
    with serve(hub_server.app) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.chdir(tmp_path)
        yield hub_server


def load():
    """Import the command, which is in no package."""
    spec = importlib.util.spec_from_file_location("fetch", COMMAND)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


command = load()


def refusal(*arguments):
    """Return the error message of the command."""
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    return str(stopped.value)


def test_a_data_set_is_downloaded_once_and_verified(tmp_path, hub):
    done = subprocess.run([sys.executable, COMMAND, "okvqa"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"lmms-lab/OK-VQA at {COMMIT} is in build/okvqa" in done.stdout
    out = tmp_path / "build" / "okvqa"
    for path in FILES.keys() - {"README.md"}:
        assert (out / path).read_bytes() == FILES[path]
    assert not (out / "README.md").exists()
    record = json.loads((out / "fetched.json").read_text())
    assert (record["repo"], record["revision"]) == ("lmms-lab/OK-VQA", COMMIT)
    assert record["files"][SMALL] == {
        "size": len(FILES[SMALL]),
        "sha256": hashlib.sha256(FILES[SMALL]).hexdigest(),
    }
    # Only a modified file is downloaded again.
    (out / SMALL).write_bytes(b"second pArt")
    hub.served.clear()
    command.main(["okvqa", "--revision=main"])
    assert hub.served == [SMALL] and (out / SMALL).read_bytes() == FILES[SMALL]


@pytest.mark.parametrize("path", sorted(FILES.keys() - {"README.md"}))
def test_a_file_with_another_digest_is_rejected(tmp_path, hub, path):
    hub.files[path] = FILES[path][:-1] + b"x"  # of the same length
    kind = "git object" if path == SMALL else "SHA-256"
    assert re.search(
        f"{path}: {kind} [0-9a-f]+, the hub says [0-9a-f]+; it was removed",
        refusal("okvqa", "--out=out"),
    )
    assert not (tmp_path / "out" / path).exists()
    assert not (tmp_path / "out" / "fetched.json").exists()


def test_failed_downloads_give_a_reason(hub, monkeypatch, capsys):
    refusal("nothing")
    assert (
        "invalid choice: 'nothing'" in (message := capsys.readouterr().err) and "okvqa" in message
    )
    assert "m-a-p/SimpleVQA: no commit is recorded" in refusal("simplevqa")
    assert "the hub has no revision 0000" in refusal("okvqa", f"--revision={'0' * 40}")
    hub.error = (403, "GatedRepo")
    assert "ask for consent" in (message := refusal("okvqa")) and "HF_TOKEN" in message
    hub.error = (401, "RepoNotFound")
    assert "the hub has no such dataset, or hides it" in refusal("okvqa")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "lmms-lab/OK-VQA: " in refusal("okvqa")
    command.main([])
    assert (
        "CaraJ/MMSearch" in (message := capsys.readouterr().out) and "needs --revision" in message
    )


def test_paths_outside_the_directory_are_rejected():
    source = command.Source("a/b", "dataset", None, ("*.pdf",))
    files = [command.RepoFile(path=path, size=1, oid="0") for path in ("b.pdf", "a/c.pdf", "d.txt")]
    assert [file.path for file in command.wanted(source, files)] == ["a/c.pdf", "b.pdf"]
    with pytest.raises(command.FetchError, match="has no file"):
        command.wanted(source, files[2:])
    for path in ("../b.pdf", "/b.pdf"):
        with pytest.raises(command.FetchError, match="has a file"):
            command.wanted(source, [command.RepoFile(path=path, size=1, oid="0")])


def test_commits_have_full_hashes():
    for name, source in command.SOURCES.items():
        assert source.revision is None or re.fullmatch("[0-9a-f]{40}", source.revision), name
        assert source.kind in ("model", "dataset")
