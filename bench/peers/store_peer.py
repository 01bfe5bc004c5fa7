"""The peers of `bench.store`: Lance, Zarr and Parquet, keeping the same rows.

A script for a Python that has pylance, zarr, pyarrow, numpy and torch; it imports nothing of this project. Arguments:
the kind, a folder of its own, a file of bfloat16 bits, how many rows, their width. It reads one JSON object per line,
`{"verb": "append" | "scan" | "gather" | "filter", "index": [row, ...]}`, and answers with one line: `{"cpu_s": ...,
"wall_s": ..., "sum": ...}`. Every verb delivers float32 in blocks as `bench.store` does; row i has label i * 7 % 100,
and `filter` asks for label 7. The first line it prints tells its version.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

BATCH, BLOCK, LABEL = 8192, 512, 7


class Peer:
    """Rows in a folder; `bits` are bfloat16 as uint16 [n, width]."""

    def __init__(self, folder: Path, bits: np.ndarray) -> None:
        self.place, self.bits = folder / "rows", bits
        self.n, self.width = bits.shape
        self.labels = np.arange(self.n) * 7 % 100

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What a capture hands over: float32, to be rounded to bfloat16."""
        buffer = torch.empty(BATCH, self.width)
        for start in range(0, self.n, BATCH):
            part = self.bits[start : start + BATCH]
            given = buffer[: len(part)]
            given.copy_(torch.from_numpy(part).view(torch.bfloat16))
            rounded = given.to(torch.bfloat16).view(torch.uint16).numpy()
            yield rounded, self.labels[start : start + len(part)]

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def append(self) -> None: ...
    def words(self) -> Iterator[np.ndarray]: ...
    def take(self, index: np.ndarray) -> np.ndarray: ...
    def filter(self) -> np.ndarray: ...


class Lance(Peer):
    """Fixed-size lists of 16-bit words, one version per batch, as a capture appends."""

    def append(self) -> None:
        import lance

        for words, labels in self.batches():
            column = pa.FixedSizeListArray.from_arrays(pa.array(words.ravel()).view(pa.float16()), self.width)
            table = pa.table({"rows": column, "label": labels})
            lance.write_dataset(table, str(self.place), mode="append" if self.place.exists() else "create")

    def _rows(self, table: Any) -> np.ndarray:
        column = table["rows"].combine_chunks()
        return column.flatten().view(pa.uint16()).to_numpy().reshape(-1, self.width)

    def words(self) -> Iterator[np.ndarray]:
        import lance

        for batch in lance.dataset(str(self.place)).to_batches(columns=["rows"], batch_size=BATCH):
            yield batch["rows"].flatten().view(pa.uint16()).to_numpy().reshape(-1, self.width)

    def take(self, index: np.ndarray) -> np.ndarray:
        import lance

        return self._rows(lance.dataset(str(self.place)).take(index, columns=["rows"]))

    def filter(self) -> np.ndarray:
        import lance

        found = lance.dataset(str(self.place)).to_table(columns=["rows"], filter=f"label = {LABEL}")
        return self._rows(found)


class Parquet(Peer):
    """Fixed-size binaries without compression, one file of many row groups."""

    def append(self) -> None:
        import pyarrow.parquet as pq

        self.place.mkdir()
        kind = pa.binary(self.width * 2)
        schema = pa.schema({"rows": kind, "label": pa.int64()})
        with pq.ParquetWriter(
            self.place / "0.parquet", schema, compression="none", use_dictionary=False
        ) as out:
            for words, labels in self.batches():
                data = pa.py_buffer(np.ascontiguousarray(words))
                rows = pa.FixedSizeBinaryArray.from_buffers(kind, len(words), [None, data])
                out.write_table(pa.table({"rows": rows, "label": labels}, schema=schema))

    def _rows(self, column: Any) -> np.ndarray:
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        words = np.frombuffer(array.buffers()[1], np.uint16)
        start = array.offset * self.width
        return words[start : start + len(array) * self.width].reshape(-1, self.width)

    def words(self) -> Iterator[np.ndarray]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.place / "0.parquet", memory_map=True) as file:
            for batch in file.iter_batches(BATCH, columns=["rows"], use_threads=False):
                yield self._rows(batch["rows"])

    def take(self, index: np.ndarray) -> np.ndarray:
        import pyarrow.dataset as ds

        found = ds.dataset(self.place).scanner(columns=["rows"], use_threads=False).take(pa.array(index))
        return self._rows(found["rows"])

    def filter(self) -> np.ndarray:
        import pyarrow.dataset as ds

        source = ds.dataset(self.place).scanner(
            columns=["rows"], filter=ds.field("label") == LABEL, use_threads=False
        )
        return self._rows(source.to_table()["rows"])


class Zarr(Peer):
    """Chunks of 8,192 rows of 16-bit words without compression; labels as an array beside them."""

    def append(self) -> None:
        import zarr

        group = zarr.open_group(str(self.place), mode="w")
        options = {"compressors": None, "filters": None}
        rows = group.create_array(
            "rows", shape=(0, self.width), chunks=(BATCH, self.width), dtype="uint16", **options
        )
        kept = group.create_array("label", shape=(0,), chunks=(1 << 17,), dtype="int64")
        for words, labels in self.batches():
            rows.append(words)
            kept.append(labels)

    def _open(self) -> Any:
        import zarr

        return zarr.open_group(str(self.place), mode="r")

    def words(self) -> Iterator[np.ndarray]:
        rows = self._open()["rows"]
        for start in range(0, self.n, BATCH):
            yield rows[start : start + BATCH]

    def take(self, index: np.ndarray) -> np.ndarray:
        return self._open()["rows"].oindex[index]

    def filter(self) -> np.ndarray:
        group = self._open()
        return group["rows"].oindex[np.flatnonzero(group["label"][:] == LABEL)]


def widened(words: np.ndarray) -> np.ndarray:
    out = torch.empty(words.shape)
    out.copy_(torch.from_numpy(np.require(words, requirements="W")).view(torch.bfloat16))
    return out.numpy()


def scan(peer: Peer) -> float:
    """One number from every block of float32: the sum of its first column."""
    buffer, total = torch.empty(BLOCK, peer.width), 0.0
    for words in peer.words():
        writable = np.require(words, requirements="W")
        for start in range(0, len(words), BLOCK):
            part = torch.from_numpy(writable[start : start + BLOCK]).view(torch.bfloat16)
            block = buffer[: len(part)]
            block.copy_(part)
            total += float(block[:, 0].sum())
    return total


def timed(verb: Callable[[], float]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = verb()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "sum": found}


def main(kind: str, folder: Path, source: Path, n: int, width: int) -> None:
    torch.set_num_threads(1)
    peer = {"lance": Lance, "parquet": Parquet, "zarr": Zarr}[kind](
        folder, np.fromfile(source, np.uint16).reshape(n, width)
    )
    module = {"lance": "lance", "parquet": "pyarrow", "zarr": "zarr"}[kind]
    print(json.dumps({"version": __import__(module).__version__}), flush=True)

    def append() -> float:
        peer.append()
        return 0.0

    for line in sys.stdin:
        order = json.loads(line)
        index = np.array(order.get("index", []), np.int64)
        verbs: dict[str, Callable[[], float]] = {
            "append": append,
            "scan": lambda: scan(peer),
            "gather": lambda index=index: float(widened(peer.take(index))[:, 0].sum()),
            "filter": lambda: float(widened(peer.filter())[:, 0].sum()),
        }
        if order["verb"] == "append":
            peer.clear()
        print(json.dumps(timed(verbs[order["verb"]])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
