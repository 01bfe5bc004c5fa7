"""The kinds of outputs, with named axes and figures. Every number here passed the gate.

Shape letters: V values (sites), N rows, K top-k or keys, M named tokens, P prompts, H heads.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.client.handles import Probe
from trocar.client.notebook import html_table, text_table
from trocar.plots import Bars, Heatmap, TokenStrip
from trocar.wire import packing
from trocar.wire import results as r

Tokens = tuple[tuple[str, ...], ...]
W = TypeVar("W", r.LensOutput, r.LogprobsOutput, r.ScoreOutput, r.PatternOutput, r.RawOutput)
SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class RowsResult(Generic[W]):
    """Results with one entry per row: which prompt and which token each row belongs to."""

    view: W
    tokens: Tokens

    @property
    def prompts(self) -> npt.NDArray[np.int64]:
        """Prompt of each row, int [N]."""
        return np.asarray(self.view.prompts)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Absolute position of each row, int [N]; a generated token lies at or beyond its prompt's length."""
        return np.asarray(self.view.positions)

    def label(self, row: int) -> str:
        """Text of a row's token."""
        return token_at(self.tokens, self.view.prompts[row], self.view.positions[row])


@dataclass(frozen=True, slots=True, repr=False)
class LensResult(RowsResult[r.LensOutput]):
    """Top-k next tokens per value and row; `names` are the V values, usually sites."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.view.names

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Token ids [V, N, K]."""
        return np.asarray(self.view.ids)

    @property
    def logprobs(self) -> npt.NDArray[np.float64]:
        """Log-probabilities in nats [V, N, K]."""
        return np.asarray(self.view.logprobs)

    def to_numpy(self) -> npt.NDArray[np.float64]:
        return self.logprobs

    @property
    def texts(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Token texts [V][N][K]."""
        return self.view.texts

    def heatmap(self, prompt: int | None = None) -> Heatmap:
        """Layers by tokens: probability of the top token, its text in the cell."""
        rows = [i for i, p in enumerate(self.view.prompts) if prompt is None or p == prompt]
        if not rows:
            raise errors.refuse("bad_argument", "prompt", f"there are no rows of prompt {prompt}")
        chance = np.exp(self.logprobs[:, rows, 0])
        return Heatmap(
            chance.tolist(),
            [self.label(i) for i in rows],
            list(self.names),
            title="Logit lens: most likely next token",
            x_title="token",
            y_title="site",
            value_title="probability",
            cell_texts=[[self.view.texts[v][i][0] for i in rows] for v in range(len(self.names))],
            text_title="top token",
            vmin=0.0,
            vmax=1.0,
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        labels = [self.label(i) for i in range(len(self.view.prompts))][:6]
        body = [
            [n, *[_top(t) for t in texts[:6]]] for n, texts in zip(self.names, self.view.texts, strict=True)
        ]
        return ["site", *[repr(x)[:18] for x in labels]], body

    def __repr__(self) -> str:
        return text_table(f"LensResult [V={len(self.names)}, N={len(self.view.prompts)}]", *self._table())

    def _repr_html_(self) -> str:
        return self.heatmap()._repr_html_()


def _top(texts: Sequence[str]) -> str:
    return repr(texts[0])[:18]


def token_at(tokens: Tokens, prompt: int, position: int) -> str:
    """Text of a row's token; generated rows are named by their index."""
    if position < 0:
        return f"mean of prompt {prompt}"
    row = tokens[prompt]
    return row[position] if position < len(row) else f"gen[{position - len(row)}]"


@dataclass(frozen=True, slots=True, repr=False)
class LogprobsResult(RowsResult[r.LogprobsOutput]):
    """Log-probabilities (nats) of named next tokens: `values` [N, M]; `texts` [prompt][M]."""

    @property
    def values(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.view.logprobs)

    def to_numpy(self) -> npt.NDArray[np.float64]:
        return self.values

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        return self.view.texts

    def diff(self, first: int = 0, second: int = 1) -> npt.NDArray[np.float64]:
        """logprob[first] - logprob[second] per row: a logit difference in nats."""
        difference: npt.NDArray[np.float64] = self.values[:, first] - self.values[:, second]
        return difference

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [str(p), self.label(i)[:16], *[f"{t!r}: {x:.3f}" for t, x in zip(self.texts[p], xs, strict=True)]]
            for i, (p, xs) in enumerate(zip(self.view.prompts, self.view.logprobs, strict=True))
        ]
        return ["prompt", "after", *[f"token {i}" for i in range(self.values.shape[1])]], rows[:SHOWN]

    def __repr__(self) -> str:
        return text_table("LogprobsResult (nats)", *self._table())

    def _repr_html_(self) -> str:
        return html_table("Log-probabilities of named next tokens (nats)", *self._table())


@dataclass(frozen=True, slots=True, repr=False)
class ScoreResult(RowsResult[r.ScoreOutput]):
    """One number per row: `values` [N]."""

    @property
    def values(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.view.scores)

    def to_numpy(self) -> npt.NDArray[np.float64]:
        return self.values

    def strip(self, prompt: int = 0) -> TokenStrip:
        """The prompt's tokens coloured by score."""
        rows = [i for i, p in enumerate(self.view.prompts) if p == prompt]
        labels = [self.label(i) for i in rows]
        return TokenStrip(labels, [self.view.scores[i] for i in rows], title=f"scores of prompt {prompt}")

    def _table(self) -> tuple[list[str], list[list[str]]]:
        pairs = enumerate(zip(self.view.prompts, self.view.scores, strict=True))
        return ["prompt", "token", "score"], [
            [str(p), self.label(i)[:24], f"{x:.4g}"] for i, (p, x) in pairs
        ][:SHOWN]

    def __repr__(self) -> str:
        return text_table("ScoreResult", *self._table())

    def _repr_html_(self) -> str:
        return html_table("Scores", *self._table())


@dataclass(frozen=True, slots=True, repr=False)
class MetricResult:
    """One number per prompt: `values` [P]; `metric` says which, `unit` in what."""

    view: r.MetricOutput

    @property
    def metric(self) -> str:
        return self.view.metric

    @property
    def unit(self) -> str:
        return "logits" if self.metric == "logit_diff" else "nats"

    @property
    def values(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.view.values)

    def to_numpy(self) -> npt.NDArray[np.float64]:
        return self.values

    def bars(self) -> Bars:
        """One bar per prompt."""
        names = [f"prompt {i}" for i in range(len(self.view.values))]
        return Bars(names, self.view.values, self.metric, self.unit)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [[str(i), f"{x:.4g}"] for i, x in enumerate(self.view.values)]
        return ["prompt", f"{self.metric} ({self.unit})"], rows[:SHOWN]

    def __repr__(self) -> str:
        return text_table("MetricResult", *self._table())

    def _repr_html_(self) -> str:
        return html_table(self.metric, *self._table())


@dataclass(frozen=True, slots=True, repr=False)
class PatternResult(RowsResult[r.PatternOutput]):
    """Attention probabilities: `values` [N, H, K]; `heads` are the H head indices, `keys[p]` the K positions."""

    @property
    def values(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.view.probs)

    def to_numpy(self) -> npt.NDArray[np.float64]:
        return self.values

    @property
    def heads(self) -> tuple[int, ...]:
        return self.view.heads

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        """Absolute position of each key, int [P, K]."""
        return np.asarray(self.view.keys)

    def heatmap(self, head: int, prompt: int = 0) -> Heatmap:
        """One head of one prompt: queries by keys."""
        rows = [i for i, p in enumerate(self.view.prompts) if p == prompt]
        if head not in self.heads or not rows:
            raise errors.refuse("bad_argument", "head", f"there is no head {head} of prompt {prompt} here")
        return Heatmap(
            self.values[rows, self.heads.index(head)].tolist(),
            [token_at(self.tokens, prompt, k) for k in self.view.keys[prompt]],
            [self.label(i) for i in rows],
            title=f"Attention of head {head}, prompt {prompt}",
            x_title="key",
            y_title="query",
            value_title="probability",
            vmin=0.0,
            vmax=1.0,
            origin="upper",
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        most = self.values.argmax(-1)
        body = [
            [str(p), self.label(i)[:16], *[repr(token_at(self.tokens, p, self.view.keys[p][k]))[:12] for k in ks[:6]]]
            for i, (p, ks) in enumerate(zip(self.view.prompts, most.tolist(), strict=True))
        ]  # fmt: skip
        return ["prompt", "query", *[f"head {h}" for h in self.heads[:6]]], body[:SHOWN]

    def __repr__(self) -> str:
        return text_table(
            f"PatternResult {list(self.values.shape)}: the key with most attention", *self._table()
        )

    def _repr_html_(self) -> str:
        return html_table("Attention: the key with most attention", *self._table())


@dataclass(frozen=True, slots=True, repr=False)
class RawResult(RowsResult[r.RawOutput]):
    """Rows as they left, of each site; `bits` says how finely a number is told apart."""

    @property
    def bits(self) -> int:
        return self.view.bits

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(rows.site for rows in self.view.values.values())

    def __getitem__(self, site: str) -> npt.NDArray[np.float32]:
        """Float32 [N, D] of a site.

        Raises:
            ClientError: `bad_argument` for a site that is not among them.
        """
        found = next((rows for rows in self.view.values.values() if rows.site == site), None)
        if found is None:
            near = errors.closest(site, self.sites)
            raise errors.refuse("bad_argument", "site", f"there are no rows of {site!r} here", closest=near)
        packed = packing.Packed(base64.b64decode(found.data), np.asarray(found.scales, np.float32))
        return packing.unpack(packed, found.width, self.view.bits)

    def to_numpy(self) -> npt.NDArray[np.float32]:
        """Float32 [N, D] of the only site.

        Raises:
            ClientError: `bad_argument` when there are several.
        """
        if len(self.sites) != 1:
            raise errors.refuse("bad_argument", "site", f"name one of the sites: {', '.join(self.sites)}")
        return self[self.sites[0]]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        return ["site", "rows", "width"], [
            [rows.site, str(len(self.view.prompts)), str(rows.width)] for rows in self.view.values.values()
        ]

    def __repr__(self) -> str:
        return text_table(f"RawResult at {self.bits} bits per number", *self._table())

    def _repr_html_(self) -> str:
        return html_table(f"Rows at {self.bits} bits per number", *self._table())


_SHOWN_AS: Final[Mapping[type[Any], Callable[[Any, Tokens], Any]]] = {
    r.LensOutput: LensResult,
    r.LogprobsOutput: LogprobsResult,
    r.ScoreOutput: ScoreResult,
    r.PatternOutput: PatternResult,
    r.RawOutput: RawResult,
    r.MetricOutput: lambda output, _tokens: MetricResult(output),
    r.FitOutput: lambda output, _tokens: Probe.of(output),
}


def shown(output: r.Output, tokens: Tokens) -> Any:
    """An output as what a user works with."""
    return _SHOWN_AS[type(output)](output, tokens)
