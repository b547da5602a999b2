"""Shards that live elsewhere: an S3 server behind a connection that breaks, HTTP, pipes; the cache stays within its
bound."""

import http.client
import os
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfFileSystem

from egom2p.data.remote import _FILESYSTEMS, RemoteShard, ShardCache, index_remote, is_remote, list_shards, retry
from egom2p.data.tarindex import npy_bytes, write_tar
from egom2p.data.tokens import TokenDataset
from egom2p.errors import UserError
from egom2p.modalities import Modality, ModalitySet
from egom2p.training.log import read_metrics
from tests.conftest import ROOT, run_cli
from tests.training.test_training import curve


class Flaky(BaseHTTPRequestHandler):
    """A proxy that answers some requests with 503 and lets others break off in the middle."""

    protocol_version = "HTTP/1.1"
    target: tuple[str, int] = ("", 0)
    rng = random.Random(0)
    trouble = {"503": 0, "cut": 0, "fine": 0}
    lock = threading.Lock()
    share = 0.25

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.lock:
            fate = self.rng.random()
        connection = http.client.HTTPConnection(*self.target)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        cuttable = len(data) > 2000 and self.command == "GET"
        kind = "503" if fate < self.share / 2 else "cut" if fate < self.share and cuttable else "fine"
        self.trouble[kind] += 1
        if kind == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = int(answer.getheader("Content-Length") or len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)
        if kind == "cut":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = _forward

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def bucket(debug_tokens):
    """s3://tokens holding the debug shards, reached through Flaky; the address of the proxy."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed (pip install 'egom2p[dev]')")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys)
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="tokens")
    for path in sorted(debug_tokens.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "tokens", path.relative_to(debug_tokens).as_posix())
    Flaky.target = (host, port)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    os.environ["AWS_ENDPOINT_URL"] = address = f"http://127.0.0.1:{proxy.server_port}"
    # s3fs reads the address once. A worker that takes over tests of this file may have had another bucket before.
    _FILESYSTEMS.clear()
    yield address
    for key in [*keys, "AWS_ENDPOINT_URL"]:
        os.environ.pop(key, None)
    proxy.shutdown()
    server.stop()


def test_what_counts_as_remote():
    assert all(map(is_remote, ("s3://b/x", "hf://datasets/a/b", "https://h/x.tar", "pipe:cat x")))
    assert not any(map(is_remote, ("runs/tokens", "/data/x", "./a:b", "C_x")))


@pytest.mark.parametrize("workers", [0, 1])
def test_training_from_a_bad_connection_equals_training_from_disk(bucket, debug_tokens, tmp_path, workers):
    """The same figures, bit for bit; the cache is bounded; trouble did occur."""
    run_cli("train", "cfgs/train/debug.yaml", f"data.root={debug_tokens}", f"run.dir={tmp_path / 'disk'}",
            "train.threads=1", "train.steps=8")
    run_cli("train", "cfgs/train/debug.yaml", "data.root=s3://tokens", f"run.dir={tmp_path / 's3'}", "train.threads=1",
            "train.steps=8", f"data.workers={workers}",
            f"data.cache={tmp_path / 'cache'}", "data.retry_s=60")
    assert curve(tmp_path / "s3") == curve(tmp_path / "disk")
    assert Flaky.trouble["503"] and Flaky.trouble["fine"]
    assert list((tmp_path / "cache").glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_download_that_breaks_off_is_noticed(bucket, tmp_path, monkeypatch):
    """Every second body is cut: no half shard is ever used."""
    monkeypatch.setattr(Flaky, "share", 1.0)
    monkeypatch.setattr(Flaky, "rng", random.Random(3))
    with pytest.raises(OSError, match="could not be had in 2 s"):
        ShardCache(tmp_path / "none", 1e9, 2.0).fetch(RemoteShard("s3://tokens/rgb/full/shard-000000.tar", 10,
                                                                  ShardCache(tmp_path, 1e9, 2.0)))
    assert not list((tmp_path / "none").glob("*.tar"))


def test_the_cache_drops_the_least_recently_used(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.bin").write_bytes(bytes(1000))
    cache = ShardCache(tmp_path / "cache", 3000, 1.0)
    paths = []
    for i in range(6):
        paths.append(cache.fetch(RemoteShard(f"pipe:cat {tmp_path / f'{i}.bin'}", 1000, cache)))
        os.utime(paths[-1], ns=(i * 10**9, i * 10**9))
    kept = [p.exists() for p in paths]
    assert kept == [False, False, False, True, True, True]


def test_the_cache_touches_nothing_of_the_users(tmp_path):
    (tmp_path / "0.bin").write_bytes(bytes(1000))
    cache = ShardCache(tmp_path / "cache", 1500, 1.0)
    cache.folder.mkdir()
    own = [cache.folder / name for name in ("my_dataset.tar", "film.iso.part", "notes.txt")]
    for path in own:
        path.write_bytes(bytes(5000))
        os.utime(path, (0, 0))
    for number in range(3):
        cache.fetch(RemoteShard(f"pipe:cat {tmp_path / '0.bin'} # {number}", 1000, cache))
    assert all(path.exists() for path in own) and len(list(cache.folder.glob("[0-9a-f]*-*"))) == 1


def test_a_shard_that_goes_for_another_while_it_is_indexed_is_fetched_again(tmp_path, monkeypatch):
    """Others share the cache: what one data set needs is not all that is in it."""
    for number in range(3):
        ids = npy_bytes(np.zeros(30, np.uint16))
        write_tar(tmp_path / f"there/{number}.tar", [{"__key__": f"k{number}", "npy": ids}])
    cache = ShardCache(tmp_path / "cache", 1e9, 1.0)
    shards = list_shards(f"file://{tmp_path}/there/*.tar", cache)
    fetch = ShardCache.fetch

    def fetch_and_lose(self, shard):
        if shard is shards[2]:
            self.path(shards[0]).unlink(missing_ok=True)
        return fetch(self, shard)

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    assert [entry.keys for entry in index_remote(shards)] == [["k0"], ["k1"], ["k2"]]


@pytest.mark.parametrize(("url", "name"), [
    ("pipe:aws s3 cp s3://b/rgb/x/shard-000003.tar -", "shard-000003.tar"), ("pipe:cat /a/b.tar", "b.tar"),
    ("pipe:ssh host cat x.tar.gz | gunzip", "x.tar.gz"), ("https://h/a/b.tar?download=1", "b.tar?download=1"),
    ("pipe:make-shard 7", "7")])
def test_what_a_shard_is_called(url, name):
    """Modalities are paired by it, so that no two shards may share one."""
    assert RemoteShard(url, -1, ShardCache.usual()).name == name


@pytest.mark.parametrize("problem", [PermissionError("Access Denied"), OSError("no route to host")])
def test_what_the_other_side_refuses_is_one_line(tmp_path, monkeypatch, problem):
    monkeypatch.setattr("egom2p.data.remote.filesystem", lambda url: (_ for _ in ()).throw(problem))
    with pytest.raises(UserError, match=str(problem)):
        TokenDataset.open("s3://bucket/tokens", "set", "", ModalitySet([Modality("cam", 256, (30,))]),
                          cache=ShardCache(tmp_path, 1e9, 0.1))


def test_a_shard_that_was_replaced_is_fetched_again(tmp_path):
    """Of the same size and under the same name, as tokens of another tokenizer are."""
    cache, url = ShardCache(tmp_path / "cache", 1e9, 1.0), f"file://{tmp_path}/there/*.tar"
    (tmp_path / "there").mkdir()
    for number, content in enumerate((b"1" * 1000, b"2" * 1000)):
        (tmp_path / "there/a.tar").write_bytes(content)
        os.utime(tmp_path / "there/a.tar", (number, number))
        shard = list_shards(url, cache)[0]
        assert cache.fetch(shard).read_bytes() == content
        assert cache.fetch(list_shards(url, cache)[0]) == cache.fetch(shard)


def test_what_a_killed_process_had_fetched_of_a_shard_is_cleared_away(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    cache = ShardCache(tmp_path / "cache", 3000, 1.0)
    cache.folder.mkdir()
    for name, age in ((".old.host-1.part", 1e6), (".new.host-2.part", 10)):
        (cache.folder / name).write_bytes(b"x")
        os.utime(cache.folder / name, (time.time() - age,) * 2)
    cache.fetch(RemoteShard(f"pipe:cat {tmp_path / 'a.bin'}", 1000, cache))
    assert [p.name for p in cache.folder.glob(".*.part")] == [".new.host-2.part"]


def test_missing_things_fail_at_once_and_passing_failures_do_not(tmp_path):
    tries = []

    def passing() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("reset")
        return 7

    assert retry(passing, "x", 30) == 7
    with pytest.raises(FileNotFoundError):
        retry(lambda: (tmp_path / "none").read_bytes(), "x", 30)


def test_a_server_that_cannot_be_asked_is_not_one_that_has_nothing(tmp_path):
    """Through fsspec's own clients: both are tried again, and say why in the end."""
    for place in ("x.tar", "folder"):
        with pytest.raises(OSError, match=rf"{place} could not be had in 0\.3 s .*annot connect"):
            list_shards(f"http://127.0.0.1:9/{place}", ShardCache(tmp_path, 1e9, 0.3))
    hub = HfFileSystem(endpoint="http://127.0.0.1:9", skip_instance_cache=True)
    with pytest.raises(OSError, match=r"could not be had in 0\.3 s .*onnection refused"):
        retry(lambda: hub.ls("datasets/me/steps"), "hf://datasets/me/steps", 0.3)


def test_https_and_pipe(debug_tokens, tmp_path):
    """Single shards by URL and by command; the same tokens as from disk."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler

    from egom2p.config import load
    from egom2p.training.pretraining import PretrainConfig

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(debug_tokens)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    modalities = ModalitySet.from_config(load(PretrainConfig, ROOT / "cfgs/train/debug.yaml").modalities)
    local = TokenDataset.open(debug_tokens, "full", "", modalities)
    names = ",".join(modalities.names)
    for pattern in (f"http://127.0.0.1:{server.server_port}/[{names}]/full/shard-{{000000..000000}}.tar",
                    f"pipe:cat {debug_tokens}/[{names}]/full/shard-000000.tar"):
        there = TokenDataset.open("", "full", pattern, modalities, (), ShardCache(tmp_path / "cache", 1e9, 10))
        assert there.fingerprint() == local.fingerprint()
        for m, ids in there.read(5).tokens.items():
            assert (ids == local.read(5).tokens[m]).all()
    cache = ShardCache(tmp_path / "cache", 1e9, 1.0)
    assert list_shards(f"http://127.0.0.1:{server.server_port}/rgb/full/shard-000009.tar", cache) == []
    assert list_shards(f"http://127.0.0.1:{server.server_port}/rgb/none", cache) == []
    server.shutdown()


def test_an_unknown_protocol_is_one_line(tmp_path):
    done = run_cli("train", "cfgs/train/debug.yaml", "data.root=nowhere://x", f"run.dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert not read_metrics(Path(tmp_path))
