"""Directories on disks and object stores behave alike, and never show a partial file."""

import os
import pickle
from pathlib import Path

import pytest

from backlens.errors import BacklensError, Interrupted
from backlens.store.directory import Directory


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    return Directory.at(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_what_is_written_can_be_read(directory: Directory):
    directory.write_atomically("a/first.json", b"1")
    directory.write_atomically("a/second.json", b"22")
    directory.write_atomically("a/first.json", b"one")
    assert directory.names() == ["a"]
    assert directory.names("a") == directory.child("a").names() == ["first.json", "second.json"]
    assert directory.read_all(["a/first.json", "a/second.json"]) == {
        "a/first.json": b"one",
        "a/second.json": b"22",
    }
    assert directory.size("a/second.json") == 2
    assert directory.exists("a/first.json")
    assert not directory.exists("a/third.json")
    with directory.open("a/first.json") as file:
        assert file.read() == b"one"
    directory.remove("a/first.json")
    assert directory.names("a") == ["second.json"]
    assert directory.names("b") == []


def test_a_file_is_created_only_where_there_is_none(directory: Directory):
    directory.create("one", b"first")
    directory.create("one", b"second")
    assert directory.read("one") == b"first"
    assert directory.names() == ["one"]


def test_a_relative_path_means_the_same_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    travelled = pickle.dumps(Directory.at("./run"))
    monkeypatch.chdir("/")
    arrived = pickle.loads(travelled)
    assert arrived.path("x") == str(tmp_path / "run" / "x")
    assert str(arrived) == "./run"


def test_file_urls_are_local(tmp_path: Path):
    assert Directory.at(f"file://{tmp_path}").path("x") == str(tmp_path / "x")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(BacklensError, match="out: cannot use nowhere://run"):
        Directory.at("nowhere://run")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = Directory.at(tmp_path)
    directory.write_atomically("run.json", b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(Interrupted, match=r"run\.json .*No space left on device.*same command again"):
        directory.write_atomically("run.json", b"new")
    assert directory.names() == ["run.json"]
    assert directory.read("run.json") == b"old"


def test_leftovers_are_removed_and_data_stay(tmp_path: Path):
    directory = Directory.at(tmp_path)
    directory.write_atomically("layers/part-000000.parquet", b"data")
    staged = directory.stage("layers/part-000001.parquet", lambda file: file.write(b"half"))
    assert os.path.dirname(staged.local_path) == str(tmp_path / "layers")
    assert directory.remove_leftovers() == [staged.local_path]
    assert directory.names("layers") == ["part-000000.parquet"]
