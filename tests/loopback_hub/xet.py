"""hf_xet's own storage in a folder.

hf_xet 1.8 takes `local:///some/folder` for the address of its storage and then keeps chunks and their index there,
instead of speaking to a server. Nothing documents this, nor the format read here; one test stands on it.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    """sha256 -> (Xet's hash, size in bytes) of the files in the storage, from its shards.

    A shard is a header of 48 bytes, then records of 48 bytes: one for a file (its hash, flags, the number of its
    terms), its terms, as many again for verification if flag 31 is set, and one with the sha256 if flag 30 is set.
    A record that begins with 32 bytes 0xFF ends the list.
    """
    known = {}
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        data, at = shard.read_bytes(), 48
        while (name := data[at : at + 32]) != b"\xff" * 32:
            flags, terms = struct.unpack_from("<2I", data, at + 32)
            size = sum(struct.unpack_from("<I", data, at + 48 * (n + 1) + 36)[0] for n in range(terms))
            at += 48 * (1 + terms * (2 if flags >> 31 & 1 else 1))
            if flags >> 30 & 1:
                known[_text(data[at : at + 32])] = (_text(name), size)
                at += 48
    return known


def read(folder: Path, sha256: str) -> bytes:
    """The content of a file in the storage."""
    import hf_xet

    with tempfile.TemporaryDirectory() as scratch:
        # The client that is still uploading holds the lock of the index: read a copy.
        shutil.copytree(folder / "xet", Path(scratch, "storage", "xet"))
        target = Path(scratch, "file")
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{scratch}/storage") as group:
            group.start_download_file(hf_xet.XetFileInfo(*hashes(folder)[sha256]), str(target))
        return target.read_bytes()


def _text(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
