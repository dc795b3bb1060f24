"""`ObjectStore`: what is pushed and pulled, who owns a directory, and failures in one line."""

import http.server
import os
import sys
import threading

import pytest

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.utils import object_store
from mmsr1_jax.utils.object_store import ObjectStore, StoreError, StoreRefusedError
from tests.object_stores import objects


def write(folder, **contents):
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def store(address, tmp_path):
    store = ObjectStore(address, tmp_path / "folder")
    store.claim("me")
    return store


@pytest.fixture
def contents(address, store_url):
    """Function that returns the texts of the store's objects, without the owner."""

    def read():
        found = objects(store_url, address.partition("://")[2].partition("/")[2] + "/")
        return {n: c.decode("utf-8", "replace") for n, c in found.items() if n != ".mmsr1-owner"}

    return read


def test_push_copies_new_and_changed_files(store, contents, monkeypatch):
    write(store.folder, a_txt="a", images__b_png="b")
    store.push()
    assert contents() == {"a.txt": "a", "images/b.png": "b"}
    copied = []
    put = store._files.put
    monkeypatch.setattr(store._files, "put", lambda own, to: (copied.append(own), put(own, to)))
    store.push()
    assert not copied
    write(store.folder, a_txt="new", images__c_png="c")
    store.push()
    assert copied == [[str(store.folder / name) for name in ("a.txt", "images/c.png")]]
    assert contents() == {"a.txt": "new", "images/b.png": "b", "images/c.png": "c"}


def test_bytes_are_copied_unchanged(store, tmp_path):
    data = bytes(range(256)) * 1000 + b"\r\n--boundary\r\n"
    (store.folder / "x.bin").write_bytes(data)
    (store.folder / "empty").touch()
    store.push()
    other = ObjectStore(store.address, tmp_path / "other")
    other.pull("x.bin", "empty")
    assert (other.folder / "x.bin").read_bytes() == data
    assert (other.folder / "empty").read_bytes() == b""


def test_hidden_files_and_checkpoints_are_pushed_only_by_name(store, contents):
    write(store.folder, _lock="x", checkpoints__3__a="x", wandb__b="x", episodes___part="x", c="c")
    store.push()
    assert contents() == {"c": "c"}
    store.push("episodes/.part")
    assert contents() == {"c": "c", "episodes/.part": "x"}
    store.remove("episodes/.part", "absent")
    assert contents() == {"c": "c"}


def test_pull_copies_what_the_folder_lacks(store, tmp_path):
    write(store.folder, a="a", images__b="b", images__c="c", other="x")
    store.push()
    second = ObjectStore(store.address, tmp_path / "second")
    write(second.folder, images__b="own")
    second.pull("a", "images", "absent")
    files = [path for path in second.folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(second.folder)): path.read_text() for path in files}
    assert names == {"a": "a", "images/b": "own", "images/c": "c"}
    assert second.holds("other") and second.holds("images") and not second.holds("absent")


def test_pulled_files_are_not_pushed_again(store, tmp_path, monkeypatch):
    write(store.folder, a="a")
    store.push()
    second = ObjectStore(store.address, tmp_path / "second")
    second.check_owner("me")
    second.pull("a")
    monkeypatch.setattr(second._files, "put", lambda *_: pytest.fail("pushed"))
    second.push()


def test_names_that_lead_out_of_the_folder_are_not_pulled(store, tmp_path):
    store._files.pipe_file(f"{store.address}/images/../../../escaped", b"x")
    store._files.pipe_file(f"{store.address}/images/fine", b"x")
    second = ObjectStore(store.address, tmp_path / "a" / "b" / "second")
    second.pull("images")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"fine"}


def test_a_new_store_empties_its_folder(address, tmp_path):
    folder = tmp_path / "folder"
    write(folder, stale="x", episodes__stale="x", _lock="x")
    ObjectStore(address, folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_the_second_owner_ends_the_first_before_it_overwrites_anything(
    store, contents, tmp_path, capsys
):
    write(store.folder, a="first")
    store.push()
    second = ObjectStore(store.address, tmp_path / "second")
    second.claim("other")
    assert f"{store.address}: taking over from process {os.getpid()} on" in capsys.readouterr().err
    write(second.folder, a="second")
    second.push()
    write(store.folder, a="first again", b="b")
    with pytest.raises(StoreRefusedError, match=f"{store.address}: process .* has taken over; th"):
        store.push()
    assert contents() == {"a": "second"}


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"owner": 1}'])
def test_an_owner_that_was_removed_or_damaged_ends_the_command(store, content):
    if content:
        store._files.pipe_file(f"{store.address}/.mmsr1-owner", content)
    else:
        store.remove(".mmsr1-owner")
    with pytest.raises(StoreError, match="ends, without overwriting anything"):
        store.push()


@pytest.mark.parametrize(
    "given", ["s3://bucket/run", "gs://bucket", "gs://", "gs://b//c", "x://y/z"]
)
def test_other_addresses_are_refused(given, tmp_path):
    with pytest.raises(UserError, match="must be gs://BUCKET/FOLDER; other stores are not"):
        ObjectStore(given, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r'needs gcsfs .*: pip install "\.\[gcs\]"'):
        ObjectStore("gs://bucket/run", tmp_path / "folder")


def test_a_bucket_that_does_not_exist_is_one_line(address, tmp_path):
    store = ObjectStore("gs://no-such-bucket/run", tmp_path / "folder")
    with pytest.raises(
        StoreRefusedError, match="^gs://no-such-bucket/run: a request to the object store failed"
    ) as e:
        store.claim("me")
    assert "\n" not in str(e.value) and "Check that the bucket exists" in str(e.value)


@pytest.fixture
def refusing_store(tmp_path, monkeypatch):
    """A store that answers every request with status 403."""
    gcsfs = pytest.importorskip("gcsfs", reason="needs tests/requirements.txt")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b'{"error": {"code": 403, "message": "caller lacks storage.objects.get"}}'
            self.send_response(403)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield ObjectStore("gs://bucket/run", tmp_path / "folder")
    server.shutdown()
    server.server_close()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_missing_permissions_are_one_line(refusing_store):
    with pytest.raises(StoreError, match="^gs://bucket/run: .*storage.objects.get.*cre") as error:
        refusing_store.claim("me")
    assert error.value.exit_code == 1  # launchers start the command again


def test_each_process_has_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {
        object_store.local_folder(address, process)
        for address in ("gs://b/one", "gs://b/two")
        for process in (0, 1)
    }
    assert len(folders) == 4 and all(folder.is_relative_to(tmp_path) for folder in folders)
    assert {folder.name for folder in folders} == {"one", "two"}
