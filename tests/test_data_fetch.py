"""`fetch`, with small files under known checksums and no network."""

import gzip
import hashlib
import os

import pytest
from torchvision import datasets

from largebatch.data import known
from largebatch.data.fetch import fetch
from largebatch.errors import DataError

CONTENT = [b"train images", b"train labels", b"test images", b"test labels"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """torchvision's download fails as it does without a network, after leaving half a file."""

    def download(root, download):
        (root / "half").write_bytes(b"half of a file")
        raise RuntimeError("Error downloading\nname not known")

    for name in ("FashionMNIST", "MNIST", "CIFAR10"):
        monkeypatch.setattr(datasets, name, download)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The known sets with the checksums of `CONTENT`."""
    for name in ("fashion-mnist", "mnist"):
        facts = {
            path: known.FileFacts(len(data), "sha256", hashlib.sha256(data).hexdigest())
            for path, data in zip(known.FILES[name], CONTENT, strict=True)
        }
        monkeypatch.setitem(known.FILES, name, facts)


def fake_debian(folder, monkeypatch, *, damage=False, needs_update=False):
    """`apt-get` and `dpkg-deb` that write their calls to a log and unpack CONTENT."""
    packed = folder / "packed"
    packed.mkdir()
    for path, data in zip(known.FILES["fashion-mnist"], CONTENT, strict=True):
        content = b"changed" if damage else data
        (packed / f"{os.path.basename(path)}.gz").write_bytes(gzip.compress(content))
    updated = folder / "updated"
    if not needs_update:
        updated.touch()
    scripts = {
        "apt-get": f"""echo "$@" >> {folder}/log
            if [ "$1" = update ]; then touch {updated}; exit 0; fi
            [ -e {updated} ] || {{ echo "E: Unable to locate package $2" >&2; exit 100; }}
            touch "$2_1_all.deb" """,
        "dpkg-deb": f"""mkdir -p "$3/usr/share/datasets/fashion-mnist"
            cp {packed}/* "$3/usr/share/datasets/fashion-mnist/" """,
    }
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, body in scripts.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")


def put(root, name="fashion-mnist"):
    for path, data in zip(known.FILES[name], CONTENT, strict=True):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def all_files(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_already_there(tmp_path):
    put(tmp_path)
    said = []
    assert fetch("fashion-mnist", tmp_path, said.append) == tmp_path / "FashionMNIST" / "raw"
    assert said == [f"fashion-mnist: already in {tmp_path}/FashionMNIST/raw, checksums agree"]


def test_torchvisions_download_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MNIST", lambda root, download: put(root, "mnist"))
    fetch("mnist", tmp_path / "new", lambda line: None)
    assert all_files(tmp_path / "new") == sorted(known.FILES["mnist"])


@pytest.mark.parametrize("needs_update", [False, pytest.param(True, marks=pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may update the package lists"))])  # fmt: skip
def test_debian_package_replaces_a_damaged_file(tmp_path, monkeypatch, needs_update):
    fake_debian(tmp_path, monkeypatch, needs_update=needs_update)
    root = tmp_path / "root"
    put(root)
    first = root / next(iter(known.FILES["fashion-mnist"]))
    first.write_bytes(b"train imagez")
    said = []
    fetch("fashion-mnist", root, said.append)
    assert first.read_bytes() == CONTENT[0]
    assert all_files(root) == sorted(known.FILES["fashion-mnist"])
    assert said[-1].endswith("checksums agree")
    calls = (tmp_path / "log").read_text().split("\n")[:-1]
    download = "download dataset-fashion-mnist"
    assert calls == ([download, "update", download] if needs_update else [download])


def test_a_damaged_package_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    fake_debian(tmp_path, monkeypatch, damage=True)
    root = tmp_path / "root"
    with pytest.raises(DataError) as caught:
        fetch("fashion-mnist", root, lambda line: None)
    message = str(caught.value)
    assert "Debian's package: " in message
    assert "damaged: 7 bytes, not 12" in message
    assert all_files(root) == []


def test_nothing_works(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    root = tmp_path / "root"
    with pytest.raises(DataError) as caught:
        fetch("fashion-mnist", root, lambda line: None)
    message = str(caught.value)
    for words in (
        "already there: ",
        "No such file",
        "torchvision's download: name not known",
        "Debian's package: apt-get is not on this machine",
        "by hand",
        *(str(root / path) for path in known.FILES["fashion-mnist"]),
    ):
        assert words in message
    assert all_files(root) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DataError, match=r"Not a directory|File exists"):
        fetch("mnist", blocked / "data", lambda line: None)


def test_sets_that_are_not_fetched(tmp_path):
    said = []
    fetch("digits", tmp_path, said.append)
    assert "nothing to fetch" in said[0]
    with pytest.raises(DataError, match=r"imagenet: cannot be downloaded; put it in .*train/CLASS/"):
        fetch("imagenet", tmp_path)
    with pytest.raises(DataError, match=r"nonsense: unknown set; .*fashion-mnist, mnist, cifar10"):
        fetch("nonsense", tmp_path)
