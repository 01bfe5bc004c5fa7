"""Ways of a worker to get bits out, each with the attacker's way to read them, and the count of what an answer can
say at all.

A mode hides a prefix of a secret bit string in one place of honest-looking answers; `read` gives back the bits that
the attacker takes from the wire. Nobody tells either of them what the gate does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import worker_room as w

from trocar import errors
from trocar.engine.protocol import Generated, Task, TaskResult

Bits = list[int]
END = 257
TOKENS = int(w.TEXT["generation"]["max_new_tokens"])


def number(bits: Sequence[int]) -> int:
    return int("".join(map(str, bits)) or "0", 2)


def bits_of(value: int, width: int) -> Bits:
    """The lowest bits of a number, highest first; nothing when it is negative or too large."""
    return [int(c) for c in f"{value:0{width}b}"] if 0 <= value < 2**width else []


@dataclass(frozen=True)
class Prices:
    """Public prices, from plans."""

    number_bits: int
    scale_bits: int
    token_bits: int
    norm_bits: int

    @classmethod
    def of(cls, wire: w.Wire) -> Prices:
        def out(program: Any, name: str = "out") -> int:
            return int(wire.plan(program)["cost"]["bits_out"][name])

        few = {
            "program": {
                "nodes": [
                    {**w.SCORE["program"]["nodes"][0], "at": "prompt[0:2]"},
                    *w.SCORE["program"]["nodes"][1:],
                ]
            }
        }
        rows = sum(map(len, w.PROMPTS))
        each = (out(w.SCORE) - out(few)) // (rows - 4)
        texts = len(w.PROMPTS) * 7
        return cls(each, out(w.SCORE) - rows * each, out(w.TEXT) // texts, -(-out(w.EDIT, "receipts") // 2))

    def admissible(self, answer: Any) -> int:
        """Bits that tell one answer from all others of its request: everything in it that is not fixed."""
        total = sum(self._output(o) for o in answer["outputs"].values())
        return total + 2 * self.norm_bits * len(answer["receipt"]["edits"])

    def _output(self, output: Any) -> int:
        kind = output["kind"]
        if kind == "score" and output["truth"]:
            return len(output["scores"])
        if kind == "text":
            return sum(len(row) + 1 for row in output["ids"]) * self.token_bits
        ids = leaves(output["ids"]) * self.token_bits if kind == "lens" else 0
        names = {
            "score": "scores",
            "lens": "logprobs",
            "logprobs": "logprobs",
            "metric": "values",
            "pattern": "probs",
        }
        return ids + (
            leaves(output[names[kind]]) * self.number_bits + self.scale_bits if kind in names else 0
        )


FREE = {
    "score": ("scores",),
    "lens": ("ids", "texts", "logprobs"),
    "logprobs": ("logprobs",),
    "metric": ("values",),
    "pattern": ("probs",),
    "text": ("ids", "texts", "finished"),
}


def fixed(answer: Any) -> str:
    """What of an answer the worker may not touch: all but what is charged for."""
    outputs = {
        name: {k: v for k, v in o.items() if k not in FREE.get(o["kind"], ())}
        for name, o in answer["outputs"].items()
    }
    receipt = dict(answer["receipt"])
    receipt["edits"] = [{k: v for k, v in e.items() if not k.startswith("norm")} for e in receipt["edits"]]
    if any(o["kind"] == "text" for o in answer["outputs"].values()):
        receipt["released_bits"] = "follows from the lengths"
    return w.plain(repr({**answer, "outputs": outputs, "receipt": receipt}))


def leaves(nested: Any) -> int:
    return sum(map(leaves, nested)) if isinstance(nested, list) else 1


@dataclass(frozen=True)
class Mode:
    """One place to hide bits.

    Attributes:
        hide: `(bits, task, result) -> result`; may raise, which is a way to speak too.
        read: the bits that one run's answers show.
        width: bits hidden in one run.
    """

    name: str
    program: dict[str, Any]
    width: int
    hide: Callable[[Bits, Task, TaskResult], TaskResult]
    read: Callable[[w.Wire, w.Heard], Bits]
    before: Callable[[Bits, Task], None] = lambda _bits, _task: None


def out(result: TaskResult, **change: Any) -> TaskResult:
    return replace(result, outputs={**result.outputs, "out": replace(result.outputs["out"], **change)})  # type: ignore[type-var]


def parts(bits: Bits, width: int) -> list[int]:
    return [number(bits[i : i + width]) for i in range(0, len(bits), width)]


ROWS = sum(map(len, w.PROMPTS))


def floats(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    """31 bits in every float32: the sign, 7 of the exponent's, all of the mantissa."""
    raw = [(p >> 30 << 31) | (((p >> 23 & 127) + 64) << 23) | (p & (2**23 - 1)) for p in parts(bits, 31)]
    return out(result, scores=np.asarray(raw, dtype=np.uint32).view(np.float32))


def read_floats(_wire: w.Wire, answer: w.Heard) -> Bits:
    raw = np.asarray(answer.json["outputs"]["out"]["scores"], dtype=np.float32).view(np.uint32).tolist()
    return list(itertools.chain.from_iterable(_float(x) for x in raw))


def _float(x: int) -> Bits:
    exponent = (x >> 23 & 255) - 64
    return (
        bits_of((x >> 31 << 30) | (exponent << 23) | (x & (2**23 - 1)), 31)
        if 0 <= exponent < 128
        else [0] * 31
    )


def levels(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    """6 bits in the level of every number, beside the largest, which fixes the scale."""
    return out(result, scores=np.asarray([63.0, *parts(bits, 6)], dtype=np.float32))


def read_levels(_wire: w.Wire, answer: w.Heard) -> Bits:
    scores = answer.json["outputs"]["out"]["scores"]
    top = scores[0] or 1.0
    return list(itertools.chain.from_iterable(bits_of(round(63 * x / top), 6) for x in scores[1:]))


def truths(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    return out(result, scores=np.asarray(bits, dtype=np.float32))


def top_ids(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    shape = result.outputs["out"].ids.shape  # type: ignore[union-attr]
    return out(result, ids=np.asarray(parts(bits, 8), dtype=np.int64).reshape(shape))


def read_top_ids(_wire: w.Wire, answer: w.Heard) -> Bits:
    rows = answer.json["outputs"]["out"]["ids"][0]
    return [b for row in rows for i in row for b in bits_of(i, 8)]


def texts(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    """Tokens, and whether an end came."""
    ids = parts(bits[2:], 8)
    half = len(ids) // 2
    ends = tuple(END if bit else None for bit in bits[:2])
    return told(result, (tuple(ids[:half]), tuple(ids[half:])), ends)


def told(result: TaskResult, ids: tuple[tuple[int, ...], ...], ends: tuple[int | None, ...]) -> TaskResult:
    """A result that gives these texts; one without an end goes on to the most that was asked for."""
    whole = tuple(
        row if end is not None else (*row, *(0,) * (TOKENS - len(row)))
        for row, end in zip(ids, ends, strict=True)
    )
    lengths = tuple(len(row) + (end is not None) for row, end in zip(whole, ends, strict=True))
    return replace(result, outputs={"out": Generated(whole, ends)}, lengths=lengths)


def read_texts(_wire: w.Wire, answer: w.Heard) -> Bits:
    output = answer.json["outputs"]["out"]
    return [
        *map(int, output["finished"]),
        *(b for row in output["ids"] for i in row[:4] for b in bits_of(i, 8)),
    ]


def lengths(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    """How long the texts are."""
    return told(result, tuple((1,) * n for n in parts(bits, 2)), (END, END))


def read_lengths(_wire: w.Wire, answer: w.Heard) -> Bits:
    return [b for row in answer.json["outputs"]["out"]["ids"] for b in bits_of(len(row), 2)]


def positions(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    tags = result.outputs["out"].tags  # type: ignore[union-attr]
    return out(result, tags=replace(tags, positions=np.asarray(parts(bits, 60), dtype=np.int64)))


def read_positions(_wire: w.Wire, answer: w.Heard) -> Bits:
    return [b for p in answer.json["outputs"]["out"]["positions"] for b in bits_of(p, 60)]


def wrote(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    return replace(result, edits=(replace(result.edits[0], rows=number(bits)),))


def counts(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    return out(result, rows_per_prompt=tuple(parts(bits, 60)))


def speech(bits: Bits, _task: Task, _result: TaskResult) -> TaskResult:
    raise errors.refuse("edit_missed", "", f"{number(bits):x}")


def read_speech(_wire: w.Wire, answer: w.Heard) -> Bits:
    said = answer.json["error"]["refusals"][0]["reason"]
    return bits_of(int(said, 16), 4000) if set(said) <= set("0123456789abcdef") and said else []


def ordered(bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    names = sorted(result.outputs, reverse=bool(bits[0]))
    return replace(result, outputs={n: result.outputs[n] for n in names})


def same(_bits: Bits, _task: Task, result: TaskResult) -> TaskResult:
    return result


def count_up(bits: Bits, task: Task) -> None:
    task.progress(number(bits))
    time.sleep(4 * w.LOOK_S)


def read_counter(wire: w.Wire, _answer: w.Heard) -> Bits:
    """The job's view, looked at while it ran and afterwards."""
    return bits_of(max(wire.peeks[-1].json["done"], wire.heard[-1].json["done"]), 4000)


def stall(bits: Bits, _task: Task) -> None:
    time.sleep(0.3 * number(bits))


def read_stall(wire: w.Wire, _answer: w.Heard) -> Bits:
    return bits_of(round(wire.heard[-1].json["elapsed_s"] / 0.3), 2)


MODES = (
    Mode("low bits of numbers", w.SCORE, 31 * ROWS, floats, read_floats),
    Mode("levels of numbers", w.SCORE, 6 * (ROWS - 1), levels, read_levels),
    Mode("truth values", w.TRUTH, ROWS, truths, lambda _w, a: [int(x) for x in a.json["outputs"]["out"]["scores"]]),
    Mode("token ids", w.LENS, 8 * 3 * ROWS, top_ids, read_top_ids),
    Mode("texts", w.TEXT, 2 + 8 * 8, texts, read_texts),
    Mode("lengths of texts", w.TEXT, 4, lengths, read_lengths),
    Mode("positions", w.SCORE, 60 * ROWS, positions, read_positions),
    Mode("rows of receipts", w.EDIT, 60, wrote, lambda _w, a: bits_of(a.json["receipt"]["edits"][0]["rows"], 60)),
    Mode(
        "rows of captures", w.CAPTURE, 120, counts,
        lambda _w, a: [b for n in a.json["outputs"]["out"]["rows_per_prompt"] for b in bits_of(n, 60)],
    ),
    Mode("error texts", w.SCORE, 4000, speech, read_speech),
    Mode(
        "order of outputs", w.TWO_SCORES, 1, ordered,
        lambda _w, a: [int([*a.json["outputs"]] == sorted(a.json["outputs"], reverse=True))],
    ),
    Mode("progress", w.SCORE, 4000, same, read_counter, count_up),
    Mode("time", w.SCORE, 2, same, read_stall, stall),
)  # fmt: skip
