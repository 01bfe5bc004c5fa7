"""Results on paper: axes, labels of rows, and reprs that escape what a tokenizer may spell."""

from __future__ import annotations

import numpy as np
import pytest

from trocar import errors
from trocar.client.outputs import LensResult, LogprobsResult, MetricResult, PatternResult, ScoreResult
from trocar.wire import results as r

TOKENS = (("<bos>", "<script>", " b"), (" c",))
LENS = LensResult(
    r.LensOutput(
        names=("resid_post.0", "resid_post.1"),
        prompts=(0, 1),
        positions=(1, 2),
        ids=(((5, 6), (7, 8)), ((9, 5), (6, 7))),
        texts=((("</s>", "x"), ("y", "z")), (("<b>", "x"), ("y", "z"))),
        logprobs=(((-0.5, -1.0), (-0.25, -2.0)), ((-0.1, -3.0), (-0.2, -4.0))),
    ),
    TOKENS,
)
NAMED = LogprobsResult(
    r.LogprobsOutput(
        prompts=(0, 1),
        positions=(2, 0),
        ids=((5, 6), (7, 8)),
        texts=(("<a>", "b"), ("c", "d")),
        logprobs=((-1.0, -3.0), (-2.0, -0.5)),
    ),
    TOKENS,
)
SCORES = ScoreResult(r.ScoreOutput(prompts=(0, 0), positions=(0, -1), scores=(1.5, -2.0)), TOKENS)


METRIC = MetricResult(r.MetricOutput(metric="kl", values=(0.5, 2.0)))
PATTERN = PatternResult(
    r.PatternOutput(
        prompts=(0, 1),
        positions=(1, 0),
        heads=(3, 5),
        keys=((0, 1), (0, 1)),
        probs=(((0.25, 0.75), (1.0, 0.0)), ((1.0, 0.0), (0.5, 0.5))),
    ),
    TOKENS,
)


def test_a_metric_has_a_unit_and_bars() -> None:
    assert METRIC.values.tolist() == METRIC.to_numpy().tolist() == [0.5, 2.0]
    assert (METRIC.metric, METRIC.unit) == ("kl", "nats")
    assert MetricResult(r.MetricOutput(metric="logit_diff", values=(1.0,))).unit == "logits"
    assert list(METRIC.bars().values) == [0.5, 2.0]
    assert "kl (nats)" in repr(METRIC)
    assert "0.5" in METRIC._repr_html_()


def test_a_pattern_is_queries_heads_and_keys() -> None:
    assert PATTERN.values.shape == PATTERN.to_numpy().shape == (2, 2, 2)
    assert PATTERN.heads == (3, 5)
    assert PATTERN.keys.tolist() == [[0, 1], [0, 1]]
    figure = PATTERN.heatmap(3)
    assert np.shape(figure.values) == (1, 2)
    assert figure.values[0][1] == 0.75
    assert list(figure.x_labels) == ["<bos>", "<script>"]
    for head, prompt in ((4, 0), (3, 7)):
        with pytest.raises(errors.ClientError) as caught:
            PATTERN.heatmap(head, prompt)
        assert str(head) in caught.value.reason


def test_axes() -> None:
    assert LENS.logprobs.shape == LENS.ids.shape == (2, 2, 2)
    assert LENS.prompts.tolist() == [0, 1]
    assert LENS.positions.tolist() == [1, 2]
    assert NAMED.values.shape == (2, 2)
    assert NAMED.diff().tolist() == [2.0, -1.5]
    assert NAMED.diff(1, 0).tolist() == [-2.0, 1.5]
    assert SCORES.values.tolist() == [1.5, -2.0]


def test_rows_are_named_by_their_token() -> None:
    assert LENS.label(0) == "<script>"
    assert LENS.label(1) == "gen[1]"  # beyond the one token of prompt 1
    assert SCORES.label(1) == "mean of prompt 0"


def test_the_heatmap_shows_the_top_tokens_probability() -> None:
    figure = LENS.heatmap()
    assert np.allclose(figure.values, np.exp([[-0.5, -0.25], [-0.1, -0.2]]))
    assert np.shape(LENS.heatmap(prompt=1).values) == (2, 1)
    with pytest.raises(errors.ClientError) as caught:
        LENS.heatmap(prompt=7)
    assert "7" in caught.value.reason


@pytest.mark.parametrize("result", [LENS, NAMED, SCORES, PATTERN], ids=lambda x: type(x).__name__)
def test_html_escapes_every_token(result: LensResult | LogprobsResult | ScoreResult | PatternResult) -> None:
    html = result._repr_html_()
    assert not [tag for tag in ("<bos>", "<script>", "</s>", "<b>", "<a>") if tag in html]
    assert "&lt;" in html
    assert type(result).__name__ in repr(result)
    assert max(len(line) for line in repr(result).splitlines()) <= 100
