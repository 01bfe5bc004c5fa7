"""The sides of `bench.store` that run in its process: this store, raw memory-mapped files, and safetensors files.

Each appends the same rows, given as float32 and kept as bfloat16, makes them durable, and delivers them as float32.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trocar.store import Reader, RowTable, Store

BATCH, BLOCK, LABEL, SHARD_BYTES = 8192, 512, 7, 64 << 20
SITE = "resid_post.12"
Bits = npt.NDArray[np.uint16]


def given(bits: Bits) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Batches of float32, as a capture hands them over, with the number of the first row."""
    buffer = np.empty((BATCH, bits.shape[1]), np.float32)
    for start in range(0, len(bits), BATCH):
        part = bits[start : start + BATCH]
        torch.from_numpy(buffer)[: len(part)].copy_(torch.from_numpy(part).view(torch.bfloat16))
        yield start, buffer[: len(part)]


def label_of(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return rows * 7 % 100


class Ours:
    """One site of one handle; tokens of prompts of 64."""

    def __init__(self, folder: Path, bits: Bits) -> None:
        self.folder, self.bits = folder / "ours", bits
        self.store: Store | None = None
        self.reader: Reader | None = None

    def clear(self) -> None:
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.store = Store(self.folder, shard_bytes=SHARD_BYTES)

    def append(self) -> float:
        assert self.store is not None
        with self.store.create(
            "bench", "m", "f", {SITE: self.bits.shape[1]}, "p", dtype="bfloat16"
        ) as writer:
            for start, vectors in given(self.bits):
                rows = np.arange(start, start + len(vectors))
                n = len(rows)
                table = RowTable.of(
                    prompt=rows // 64, position=rows % 64, token_id=rows % 50_000, token=["word"] * n,
                    phase=["prompt"] * n, label=label_of(rows),
                )  # fmt: skip
                writer.append({SITE: vectors}, table)
            handle = writer.finish().id
        self.reader = self.store.open("bench", handle)
        self.rows = self.reader.site(SITE)
        return 0.0

    def scan(self) -> float:
        return sum(float(torch.from_numpy(block)[:, 0].sum()) for block in self.rows.blocks(BLOCK))

    def gather(self, index: npt.NDArray[np.int64]) -> float:
        return float(self.rows.take(index)[:, 0].sum())

    def filter(self) -> float:
        assert self.reader is not None
        return float(self.reader.view().where(label=LABEL).site(SITE).read()[:, 0].sum())

    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.safetensors"))


class Raw:
    """The limit: bits in files of 64 MiB, synchronised, mapped once; labels in memory."""

    def __init__(self, folder: Path, bits: Bits) -> None:
        self.folder, self.bits = folder / "raw", bits
        self.width = bits.shape[1]
        self.per_shard = SHARD_BYTES // (2 * self.width)
        self.labels = label_of(np.arange(len(bits)))

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def append(self) -> float:
        shard = torch.empty(self.per_shard, self.width, dtype=torch.bfloat16)
        filled = number = 0
        for _, vectors in given(self.bits):
            rows = torch.from_numpy(vectors)
            while len(rows):
                part = rows[: self.per_shard - filled]
                shard[filled : filled + len(part)].copy_(part)
                filled, rows = filled + len(part), rows[len(part) :]
                if filled == self.per_shard:
                    self._write(number, shard)
                    filled, number = 0, number + 1
        if filled:
            self._write(number, shard[:filled])
        self.shards = self._open()
        return 0.0

    def _write(self, number: int, shard: torch.Tensor) -> None:
        with open(self.folder / f"{number:06d}.bin", "wb", buffering=0) as file:
            data = memoryview(shard.view(torch.uint16).numpy()).cast("B")
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())

    def _open(self) -> list[Bits]:
        return [np.memmap(p, np.uint16, "c").reshape(-1, self.width) for p in self.files()]

    def scan(self) -> float:
        buffer, total = torch.empty(BLOCK, self.width), 0.0
        for shard in self.shards:
            for start in range(0, len(shard), BLOCK):
                part = torch.from_numpy(shard[start : start + BLOCK]).view(torch.bfloat16)
                buffer[: len(part)].copy_(part)
                total += float(buffer[: len(part), 0].sum())
        return total

    def gather(self, index: npt.NDArray[np.int64]) -> float:
        return float(self._take(index)[:, 0].sum())

    def _take(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        bits = np.empty((len(index), self.width), np.uint16)
        shards = index // self.per_shard
        for number in np.unique(shards).tolist():
            here = shards == number
            bits[here] = self.shards[number][index[here] - number * self.per_shard]
        out = torch.empty(bits.shape)
        out.copy_(torch.from_numpy(bits).view(torch.bfloat16))
        return out.numpy()

    def filter(self) -> float:
        return float(self._take(np.flatnonzero(self.labels == LABEL))[:, 0].sum())

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.bin"))


class Safetensors(Raw):
    """The library's own reader and writer, one file per 64 MiB."""

    def __init__(self, folder: Path, bits: Bits) -> None:
        super().__init__(folder, bits)
        self.folder = folder / "safetensors"

    def _write(self, number: int, shard: torch.Tensor) -> None:
        path = self.folder / f"{number:06d}.safetensors"
        save_file({"rows": shard.contiguous()}, path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def _open(self) -> list[Any]:
        handles = [safe_open(p, framework="pt") for p in self.files()]
        return [h.get_tensor("rows").view(torch.uint16).numpy() for h in handles]

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def forget(files: list[Path]) -> None:
    """Makes the system forget what it holds of the files."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


Verb = Callable[[], float]
