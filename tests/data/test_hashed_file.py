"""The hash of a file that is hashed while it is written is that of what stands on the disk; a full disk is told."""

import random

import pytest

from megalong.data import hashed_file
from megalong.data.hashed_file import HashedFile
from megalong.runtime.files import sha256_of
from tests.training.disks import small_disk


@pytest.mark.parametrize("total", [0, 1, 99, 100, 5000])
def test_the_hash_is_that_of_the_file_whatever_is_put_together_and_synced(tmp_path, monkeypatch, total):
    monkeypatch.setattr(hashed_file, "AT_ONCE", 100)
    monkeypatch.setattr(hashed_file, "SYNC", 1000)
    chance, path = random.Random(total), tmp_path / "file"
    expected = chance.randbytes(total)
    file, at = HashedFile(path), 0
    while at < total:
        size = chance.choice([1, 30, 100, 700])
        file.write(memoryview(expected[at : at + size]))
        at += size
    digest = file.close()
    assert path.read_bytes() == expected
    assert digest == sha256_of(path)
    assert file.bytes == total


def test_a_full_disk_is_told_at_the_latest_when_the_file_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(hashed_file, "AT_ONCE", 2**16)
    with small_disk(tmp_path / "disk", 1) as disk:
        file = HashedFile(disk / "file")

        def fill() -> None:
            for _ in range(64):
                file.write(bytes(2**16))
            file.close()

        with pytest.raises(OSError, match="No space left on device"):
            fill()
