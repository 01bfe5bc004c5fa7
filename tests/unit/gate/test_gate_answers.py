"""From arrays to an answer: each output rebuilt by hand, tails dropped, and a worker's lies refused."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from answer_room import (
    COARSE,
    EOS,
    EXACT,
    FACTS,
    KEPT,
    TOKEN_BITS,
    Letters,
    answer,
    arrays,
    checked,
    dot,
    node,
    read,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import errors
from trocar.gate import answers
from trocar.gate.answers import Raw, Reader
from trocar.gate.coding import Coder
from trocar.graph import ops
from trocar.graph.cost import Prices
from trocar.wire import packing
from trocar.wire import results as r

PROBS = {"site": "attn_probs.1", "keys": "prompt[0:2]"}
LENS = [read(), read("s", site="final_norm"), node("lens", of=["r", "s"], top_k=2)]
IDS = [[[1, 2], [3, 4]], [[5, 6], [7, EOS]]]
NUMBERS = [[[-0.5, -1.5], [-2.0, -3.0]], [[-0.03125, -4.0], [-5.0, -99.0]]]


def test_a_lens() -> None:
    given = {"x.ids": IDS, "x.logprobs": NUMBERS}
    made = answer(checked(*LENS), given)
    assert made.outputs["x"] == r.LensOutput(
        names=("resid_post.1", "final_norm"),
        prompts=(0, 1),
        positions=(2, 4),
        ids=(((1, 2), (3, 4)), ((5, 6), (7, EOS))),
        texts=((("<1>", "<2>"), ("<3>", "<4>")), (("<5>", "<6>"), ("<7>", "<299>"))),
        logprobs=(((-0.5, -1.5), (-2.0, -3.0)), ((-0.03125, -4.0), (-5.0, -99.0))),
    )
    assert made.bits == {"x": 8 * (TOKEN_BITS + 32)}
    coarse = answer(checked(*LENS), given, COARSE)
    assert coarse.bits == {"x": 8 * (TOKEN_BITS + 8)}
    assert coarse.outputs["x"].logprobs[1] == ((0.0, -4.0), (-5.0, -15.9375))  # type: ignore[union-attr]


def test_a_lens_of_what_was_made_has_the_name_of_its_node() -> None:
    nodes = [read(at="prompt[*]"), node("mean", "mid", of="r"), node("lens", of=["mid"], top_k=1)]
    made = answer(checked(*nodes)).outputs["x"]
    assert isinstance(made, r.LensOutput)
    assert (made.names, made.prompts, made.positions) == (("mid",), (0, 1), (-1, -1))


def test_logprobs_of_tokens_by_prompt() -> None:
    program = checked(node("logprobs", at="prompt[0]", tokens=[["a", 5], [7, "b"]]))
    given = {"x.logprobs": [[-1.0, -2.0], [-3.03, -40.0]]}
    made = answer(program, given, COARSE)
    assert made.outputs["x"] == r.LogprobsOutput(
        prompts=(0, 1),
        positions=(0, 0),
        ids=((97, 5), (7, 98)),
        texts=(("<97>", "<5>"), ("<7>", "<98>")),
        logprobs=((-1.0, -2.0), (-3.0, -15.9375)),
    )
    assert made.bits == {"x": 4 * 8}


def test_scores_are_steps_of_the_largest() -> None:
    nodes = [read(at="prompt[0,-1]"), *dot(), node("score", of="d")]
    made = answer(checked(*nodes), {"x.scores": [2.0, -1.0, 0.003, 0.5]}, COARSE)
    assert made.outputs["x"] == r.ScoreOutput(
        prompts=(0, 0, 1, 1), positions=(0, 2, 0, 4), scores=tuple(_f(2 * k / 127) for k in (127, -64, 0, 32))
    )
    assert made.bits == {"x": 4 * 8 + 16}
    exact = answer(checked(*nodes), {"x.scores": [2.0, -1.0, 0.1, 1e-45]})
    assert exact.outputs["x"].scores == (2.0, -1.0, 0.1, 1e-45)  # type: ignore[union-attr]
    assert exact.bits == {"x": 4 * 32}


def _f(x: float) -> float:
    return float(str(np.float32(x)))


@pytest.mark.parametrize("prices", [EXACT, COARSE])
def test_a_truth_value_is_one_bit_whatever_number_came(prices: Prices) -> None:
    nodes = [read(at="prompt[*]"), *dot(), node("gt", "g", a="d", b=0.0), node("score", of="g")]
    given = {"x.scores": [1, 0, 0.25, -3, -0.0, np.nan, np.inf, 1e-45]}
    made = answer(checked(*nodes), given, prices)
    assert made.outputs["x"].scores == (1, 0, 1, 1, 0, 1, 1, 1)  # type: ignore[union-attr]
    assert made.outputs["x"].truth  # type: ignore[union-attr]
    assert made.bits == {"x": 8}


def test_a_number_and_a_truth_value_of_each_prompt() -> None:
    nodes = [read(at="prompt[*]"), node("mean", "m", of="r"), *dot("m"), node("lt", "g", a="d", b=0.0)]
    made = answer(
        checked(*nodes, node("score", of="d"), node("score", "y", of="g")),
        {"x.scores": [3, -3], "y.scores": [0, 1]},
    )
    for name, scores in (("x", (3.0, -3.0)), ("y", (0.0, 1.0))):
        output = made.outputs[name]
        assert isinstance(output, r.ScoreOutput)
        assert (output.prompts, output.positions, output.scores) == ((0, 1), (-1, -1), scores)
    assert made.bits == {"x": 64, "y": 2}


def test_scores_of_stored_rows() -> None:
    nodes = [
        node("stored", "k", handle=KEPT, site="resid_post.1"),
        node("norm", "n", of="k"),
        node("score", of="n"),
    ]
    made = answer(checked(*nodes), {"x.scores": [1.0, 2.0, 3.0]})
    assert made.outputs["x"] == r.ScoreOutput(
        prompts=(0, 0, 1), positions=(-1, -1, -1), scores=(1.0, 2.0, 3.0)
    )


def test_a_metric() -> None:
    program = checked(node("metric", metric="cross_entropy", at="prompt[:-1]"))
    made = answer(program, {"x.values": [4.0, 1.0]}, COARSE)
    assert made.outputs["x"] == r.MetricOutput(metric="cross_entropy", values=(4.0, _f(32 * 4 / 127)))
    assert made.bits == {"x": 2 * 8 + 16}


def test_a_pattern() -> None:
    program = checked(read(heads=[1], **PROBS), node("pattern", of="r"))
    made = answer(program, {"x.probs": [[[0.25, 0.75]], [[1.0, -0.0]]]}, COARSE)
    assert made.outputs["x"] == r.PatternOutput(
        prompts=(0, 1),
        positions=(2, 4),
        heads=(1,),
        keys=((0, 1), (0, 1)),
        probs=(((_f(64 / 255), _f(191 / 255)),), ((1.0, 0.0),)),
    )
    assert not np.signbit(made.outputs["x"].probs[1][0][1])  # type: ignore[union-attr]
    assert made.bits == {"x": 4 * 8}
    two = answer(checked(read(at="prompt[*]", **PROBS), node("pattern", of="r")))
    assert isinstance(two.outputs["x"], r.PatternOutput)
    assert np.array(two.outputs["x"].probs).shape == (8, 2, 2)
    assert (two.outputs["x"].heads, two.bits) == ((0, 1), {"x": 32 * 32})


@pytest.mark.parametrize(
    ("bits", "each"), [(4, 4 * 8 + 16), (8, 8 * 8 + 16), (16, 16 * 8 + 16), (32, 32 * 8)]
)
def test_raw_rows(bits: int, each: int) -> None:
    prices = Prices(scalar_bits=8, overhead_bits=256, vector_bits=bits)
    nodes = [read(), read("s", site="mlp_act.2"), node("raw", of=["r", "s"])]
    rows = np.arange(16, dtype=np.float32).reshape(2, 8) - 3
    made = answer(checked(*nodes), {"x.0": rows, "x.1": np.ones((2, 16))}, prices)
    output = made.outputs["x"]
    assert isinstance(output, r.RawOutput)
    assert (output.prompts, output.positions, output.bits) == ((0, 1), (2, 4), bits)
    assert [(v.site, v.width) for v in output.values.values()] == [("resid_post.1", 8), ("mlp_act.2", 16)]
    assert list(output.values) == ["r", "s"]
    first = output.values["r"]
    data = base64.b64decode(first.data, validate=True)
    back = packing.unpack(packing.Packed(data, np.array(first.scales, np.float32)), 8, bits)
    assert first.scales == (() if bits == 32 else (4.0, 12.0))
    assert np.abs(back - rows).max() <= (0 if bits == 32 else 12.0 / (2 ** (bits - 1) - 1) / 2 * 1.001)
    wide = 32 * 16 if bits == 32 else bits * 16 + 16
    assert made.bits == {"x": 2 * (each + wide)}
    assert len(data) * 8 + 16 * len(first.scales) == 2 * each  # what is sent is what is counted


def test_a_text_with_its_end_and_without() -> None:
    program = checked(node("text"), lengths=(3, 5, 4), new=3)
    ids = [[EOS, 0, 0], [4, 5, 6], [4, 5, 298]]
    made = answer(program, {"x.ids": ids, "lengths": [1, 3, 3]})
    assert made.outputs["x"] == r.TextOutput(
        texts=("", "<4><5><6>", "<4><5>"), ids=((), (4, 5, 6), (4, 5)), finished=(True, False, True)
    )
    assert made.bits == {"x": (1 + 4 + 3) * TOKEN_BITS}


def test_an_end_token_is_a_token_where_nothing_stops_at_it() -> None:
    program = checked(node("text"), lengths=(3,), new=2, eos=False)
    made = answer(program, {"x.ids": [[EOS, EOS]]})
    assert made.outputs["x"] == r.TextOutput(texts=("<299><299>",), ids=((EOS, EOS),), finished=(False,))
    assert made.bits == {"x": 3 * TOKEN_BITS}


def test_captures() -> None:
    nodes = [
        read(at="all"),
        read("s", site="mlp_act.2", at="all"),
        node("capture", of=["r", "s"]),
        node("text", "t"),
    ]
    program = checked(*nodes, new=4)
    made = answer(program, {"lengths": [2, 4], "t.ids": [[1, EOS, 0, 0], [1, 2, 3, 4]]})
    assert made.outputs["x"] == r.CaptureOutput(
        handle="act_" + "0" * 32,
        sites=("resid_post.1", "mlp_act.2"),
        widths={"resid_post.1": 8, "mlp_act.2": 16},
        rows=(3 + 2) + (5 + 4),
        bytes=14 * 24 * 4,
        rows_per_prompt=(5, 9),
    )
    assert made.bits == {"x": 0, "t": (1 + 1 + 4 + 1) * TOKEN_BITS, "lengths": 2 * 3}


def test_a_captured_mean_is_a_row_per_prompt() -> None:
    program = checked(read(at="prompt[*]"), node("capture", of=["r"], reduce="mean"))
    output = answer(program).outputs["x"]
    assert isinstance(output, r.CaptureOutput)
    assert (output.rows, output.rows_per_prompt, output.bytes) == (2, (1, 1), 64)


EDITS = [
    node("edit.scale", "e", site="resid_post.1", at="prompt[0:2]", by=2.0),
    node("edit.set", "f", site="z.2", at="all", value="zero"),
]


def test_receipts() -> None:
    program = checked(*EDITS, node("logprobs", tokens=["a"]), new=4)
    norms = [[0.1, 0.2], [3.0, 0.0]]
    given = {"receipts.norms": norms, "receipts.rows": [4, 13], "lengths": [4, 2]}
    made = answer(program, given, COARSE)
    assert made.edits == (
        r.EditReceipt(id="e", op="edit.scale", site="resid_post.1", rows=4, norm_before=0.100097656, norm_after=0.20019531),
        r.EditReceipt(id="f", op="edit.set", site="z.2", rows=13, norm_before=3.0, norm_after=0.0),
    )  # fmt: skip
    assert made.bits == {"x": 2 * 8, "receipts": 2 * (2 * 16 + 4)}  # 0 to 8 generated rows: 4 bits
    assert answer(program, given, EXACT).bits["receipts"] == 2 * (2 * 32 + 4)
    assert answer(checked(EDITS[0], node("logprobs", tokens=["a"]))).bits["receipts"] == 2 * 32
    assert answer(checked(node("logprobs", tokens=["a"]))).edits == ()


# ---- tails ----------------------------------------------------------------------------------------

LATE = [
    read(at="gen[1:]"), *dot(), node("gt", "g", a="d", b=0.0), read("p", at="gen[1:]", **PROBS),
    node("lens", "a", of=["r"], top_k=1), node("logprobs", "b", at="gen[1:]", tokens=["a"]), node("score", "c", of="d"),
    node("score", "e", of="g"), node("pattern", "f", of="p"), node("raw", "h", of=["r"]), node("text", "t"),
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(2, 4)), st.sampled_from([0.75, np.nan, -np.inf, 3e38]))
def test_what_lies_behind_the_last_row_is_dropped(lengths: tuple[int, int], tail: float) -> None:
    """Whatever stands there, not a bit of the answer is another."""
    program = checked(*LATE, new=4)
    rows = sum(n - 1 for n in lengths)
    given: dict[str, Any] = {
        "a.ids": np.full((1, rows, 1), 5), "a.logprobs": np.full((1, rows, 1), -1.0),
        "b.logprobs": np.full((rows, 1), -1.0), "c.scores": np.arange(rows), "e.scores": np.ones(rows),
        "f.probs": np.full((rows, 2, 2), 0.5), "h.0": np.ones((rows, 8)), "lengths": lengths,
        "t.ids": [[*[4] * (n - 1), EOS, *[0] * (4 - n)] for n in lengths],
    }  # fmt: skip
    clean = answer(program, given, COARSE)
    noisy = arrays(program, given)
    for name, array in noisy.items():
        if name[0] in "abcefh":
            behind = (slice(None), slice(rows, None)) if name[0] == "a" else (slice(rows, None),)
            array[behind] = 17 if name == "a.ids" else tail
    for row, n in zip(noisy["t.ids"], lengths, strict=True):
        row[n:] = 17
    assert Reader.of(Raw(program, noisy, {}), FACTS, Letters(), Coder(COARSE)).answer() == clean
    assert clean.bits == {
        "a": rows * (TOKEN_BITS + 8), "b": rows * 8, "c": rows * 8 + 16, "e": rows, "f": rows * 4 * 8,
        "h": rows * (8 * 4 + 16), "t": sum(lengths) * TOKEN_BITS, "lengths": 2 * 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a", "b", "c", "e", "f", "h"])
def test_an_output_without_a_row_fails(name: str) -> None:
    keep = [
        n for n in LATE if n["id"] == name or n["op"] not in ("lens", "logprobs", "score", "pattern", "raw")
    ]
    given = {"lengths": [1, 1], "t.ids": [[EOS, 0, 0, 0]] * 2}
    with pytest.raises(errors.RunFailed) as caught:
        answer(checked(*keep, new=4), given)
    assert (caught.value.code, caught.value.path) == ("edit_missed", name)


# ---- lies -----------------------------------------------------------------------------------------


def lie(program: Any, given: dict[str, Any], path: str) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        answer(program, given)
    assert (caught.value.code, caught.value.path) == ("bad_result", path)


@pytest.mark.parametrize("token", [-1, 300, 2**31 - 1, -(2**31)])
def test_token_ids_are_of_the_vocabulary(token: int) -> None:
    lie(checked(*LENS), {"x.ids": [[[1, token]]], "x.logprobs": NUMBERS}, "x.ids")
    lie(checked(node("text"), new=4), {"x.ids": [[1, 2, token, 3]]}, "x.ids")


@pytest.mark.parametrize(("ids", "lengths"), [
    ([[1, 2, 0, 0]], [2, 4]), ([[1, 2, EOS, 0]], [2, 4]), ([[EOS, 1, 0, 0]], [2, 4]), ([[0, 0, 0, 0]], [1, 4]),
])  # fmt: skip
def test_a_text_ends_early_with_an_end_token_only(ids: Any, lengths: Any) -> None:
    lie(checked(node("text"), new=4), {"x.ids": ids, "lengths": lengths}, "text")


@pytest.mark.parametrize(
    ("rows", "name"), [([4, 7], "f"), ([4, 17], "f"), ([4, -1], "f"), ([4, 2**31 - 1], "f")]
)
def test_edits_write_no_more_rows_than_there_are(rows: list[int], name: str) -> None:
    """The second edit writes 8 rows of prompts and 0 to 8 of generated tokens."""
    program = checked(*EDITS, node("logprobs", tokens=["a"]), new=4)
    lie(program, {"receipts.rows": rows}, name)


@pytest.mark.parametrize("said", [0, 1, 4, 99, -7])
def test_rows_that_are_known_are_not_asked_for(said: int) -> None:
    program = checked(*EDITS, node("logprobs", tokens=["a"]), new=4)
    assert answer(program, {"receipts.rows": [said, 8]}).edits[0].rows == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e38])
@pytest.mark.parametrize("prices", [EXACT, COARSE])
@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        (LENS, "x.logprobs"),
        ([node("logprobs", tokens=["a"])], "x.logprobs"),
        ([read(), *dot(), node("score", of="d")], "x.scores"),
        ([node("metric", metric="cross_entropy", at="prompt[0]")], "x.values"),
        ([read(**PROBS), node("pattern", of="r")], "x.probs"),
        ([read(), node("raw", of=["r"])], "x.0"),
        ([EDITS[0], node("logprobs", tokens=["a"])], "receipts.norms"),
    ],
)
def test_numbers_that_are_not_finite_do_not_leave(nodes: Any, name: str, prices: Prices, bad: float) -> None:
    program = checked(*nodes)
    given = arrays(program)[name]
    given[(-1,) * given.ndim] = bad
    with pytest.raises(errors.RunFailed) as caught:
        answer(program, {name: given}, prices)
    assert caught.value.code == "result_not_finite"


def test_every_output_op_is_built() -> None:
    assert set(answers._BUILD) == set(ops.OUTPUT_NODES)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=8, max_size=8),
    st.sampled_from([4, 5, 8, 11, 16, 32]),
    st.sampled_from([4, 8, 16, 32]),
)
def test_the_text_is_a_function_of_the_charged_bits(numbers: list[float], scalar: int, vector: int) -> None:
    """Numbers are sent as decimals; each names one float32, which rounding leaves alone."""
    prices = Prices(scalar_bits=scalar, overhead_bits=256, vector_bits=vector)
    nodes = [
        read(at="prompt[*]"),
        *dot(),
        node("score", of="d"),
        node("logprobs", "y", at="prompt[*]", tokens=["a"]),
    ]
    given = {"x.scores": numbers, "y.logprobs": -np.abs([[n] for n in numbers])}
    made = answer(checked(*nodes), given, prices)
    text = made.outputs["x"].model_dump_json() + made.outputs["y"].model_dump_json()
    coder = Coder(prices)
    x, y = (
        np.array(made.outputs[name].scores if name == "x" else made.outputs[name].logprobs, np.float32)
        for name in "xy"
    )  # type: ignore[union-attr]
    expected = coder.numbers(np.array(numbers, np.float32))
    assert x.tobytes() == expected.tobytes()
    assert (y == coder.logprobs(y)).all()
    assert all(float(str(n)) == s for n, s in zip(x, made.outputs["x"].scores, strict=True))  # type: ignore[union-attr]
    if scalar != 11:  # between 9 and 16 bits numbers that are rounded twice may move
        again = answer(checked(*nodes), {"x.scores": x, "y.logprobs": y}, prices)
        assert text == "".join(again.outputs[n].model_dump_json() for n in "xy")
