"""Things that live on the server, seen from here: stored rows, directions, probes. Ids and facts, no numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trocar import errors, strict
from trocar.client.notebook import bytes_text, html_table, text_table
from trocar.graph import ops
from trocar.graph.builder import Position, indices, selector
from trocar.graph.program import Node
from trocar.plots import Line, Lines
from trocar.sites import parse
from trocar.wire import results as r


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The stored rows of one site, aligned with prompts by index; usable as a value in an edit.

    Attributes:
        prompts: which stored prompt each prompt of the request gets; None for the one of the same index.
        at: which of the stored rows of a prompt, counted over their order.
    """

    handle: str
    site: str
    prompts: tuple[int, ...] | None = None
    at: str = "prompt[*]"

    def rows(self, *, prompts: Sequence[int] | None = None, at: Position = "prompt[*]") -> StoredRows:
        """Some of the stored rows: `clean["resid_post.14"].rows(prompts=[0, 0], at=-1)`.

        Args:
            prompts: a stored prompt for each prompt of the request, for example one for all.
            at: index, slice or `prompt[...]` over the stored rows of a prompt.
        """
        return replace(self, prompts=indices(prompts, "prompts"), at=selector(at))

    def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
        fields = {} if self.prompts is None else {"prompts": self.prompts}
        node = strict.make(ops.Stored, id=node_id, handle=self.handle, site=self.site, at=self.at, **fields)
        return node, 1.0


@dataclass(frozen=True, slots=True)
class Direction:
    """A fitted direction on the server; `2.0 * direction` scales it.

    Attributes:
        site: the site it is for; None takes the site where it is used.
    """

    handle: str
    sites: tuple[str, ...]
    site: str | None = None
    coef: float = 1.0

    def __repr__(self) -> str:
        where = self.site or (self.sites[0] if len(self.sites) == 1 else f"{len(self.sites)} sites")
        return f"{self.coef:g} * Direction({self.handle}, {where}): lives on the server"

    def __mul__(self, by: float) -> Direction:
        return replace(self, coef=self.coef * by)

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return self * -1.0

    def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
        return ops.Vector(id=node_id, handle=self.handle, site=self._at(site)), self.coef

    def _at(self, used: str | None) -> str:
        site = self.site or used
        if site is None:
            raise errors.refuse(
                "bad_argument",
                "direction",
                f"the direction covers {len(self.sites)} sites: name one, probe['{self.sites[0]}']",
            )
        if site not in self.sites:
            near = errors.closest(site, self.sites)
            raise errors.refuse(
                "wrong_handle", "direction", f"the fit has no direction for {site!r}", closest=near
            )
        return site


@dataclass(frozen=True, slots=True)
class Probe:
    """A fit's artifact: its numbers stay on the server, its metrics are here.

    Attributes:
        metrics: by site, then by name; see docs/fits.md.
    """

    handle: str
    kind: str
    metrics: Mapping[str, Mapping[str, float]]
    n_train: int
    n_test: int
    site: str | None = None

    @classmethod
    def of(cls, output: r.FitOutput) -> Probe:
        return cls(
            output.artifact,
            output.fit,
            {s.site: s.metrics for s in output.sites},
            output.n_train,
            output.n_test,
        )

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    @property
    def direction(self) -> Direction:
        """The direction of the site where it is used, or of the selected site.

        Raises:
            ClientError: `bad_argument` for a fit of many classes, or to rows, which has no one direction.
        """
        if self.kind in ("multinomial", "linear_map"):
            reason = f"a {self.kind} fit has no one direction for each site"
            raise errors.refuse(
                "bad_argument",
                "direction",
                reason,
                next_step="Fit one class against the others: logistic or lda.",
            )
        return Direction(self.handle, self.sites, self.site)

    def __getitem__(self, site: str) -> Probe:
        """The same fit at one site."""
        if site not in self.metrics:
            raise errors.refuse(
                "wrong_handle", "probe", f"the fit has no {site!r}", closest=errors.closest(site, self.sites)
            )
        return replace(self, site=site)

    def metric(self, name: str) -> dict[str, float]:
        """One metric by site.

        Raises:
            ClientError: `bad_argument` for a metric that the fit did not report.
        """
        known = next(iter(self.metrics.values()))
        if name not in known:
            raise errors.refuse(
                "bad_argument",
                name,
                f"{name!r} is not a metric of this fit",
                closest=errors.closest(name, known),
            )
        return {site: m[name] for site, m in self.metrics.items()}

    def lines(self, metric: str = "auroc") -> Lines:
        """The metric by layer, with its interval and the shuffled-label control where the fit reports them."""
        layers = [float(parse(s).layer or 0) for s in self.sites]
        known = next(iter(self.metrics.values()))
        band = f"{metric}_low" in known
        main = Line(
            f"{self.kind} probe", layers, list(self.metric(metric).values()),
            list(self.metric(f"{metric}_low").values()) if band else None,
            list(self.metric(f"{metric}_high").values()) if band else None,
        )  # fmt: skip
        control = f"{metric}_shuffled"
        series = [main]
        if control in known:
            series.append(Line("shuffled labels", layers, list(self.metric(control).values()), dashed=True))
        title = f"{self.kind}: {metric} on {self.n_test} held-out prompts"
        return Lines(series, title, "layer", metric, band_title="95 % interval" if band else "")

    def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
        """A probe used as a value is its direction."""
        return self.direction.operand(node_id, site)

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        names = list(next(iter(self.metrics.values())))
        return ["site", *names], [[s, *[f"{v:.4g}" for v in m.values()]] for s, m in self.metrics.items()]

    def __repr__(self) -> str:
        head, rows = self._rows()
        return text_table(
            f"Probe {self.handle} ({self.kind}, {self.n_train} train / {self.n_test} test)", head, rows
        )

    def _repr_html_(self) -> str:
        head, rows = self._rows()
        return html_table(f"{self.kind} probe, {self.n_train} train / {self.n_test} test", head, rows)


@dataclass(frozen=True, slots=True)
class Stored:
    """Facts of stored activations, shared by the sync and async handle."""

    handle: str
    sites: tuple[str, ...]
    widths: Mapping[str, int]
    rows: int
    bytes: int

    @classmethod
    def of(cls, output: r.CaptureOutput | r.HandleView) -> Stored:
        """The facts of a handle that an answer names."""
        return cls(output.handle, output.sites, output.widths, output.rows, output.bytes)

    def at(self, site: str) -> StoredRows:
        if site not in self.sites:
            near = errors.closest(site, self.sites)
            raise errors.refuse(
                "wrong_handle", "activations", f"{self.handle} holds no {site!r}", closest=near
            )
        return StoredRows(self.handle, site)

    def text(self) -> str:
        span = (
            self.sites[0]
            if len(self.sites) == 1
            else f"{self.sites[0]} .. {self.sites[-1]} ({len(self.sites)} sites)"
        )
        size = f"{self.rows} rows each, float32, {bytes_text(self.bytes)} on the server, nothing downloaded"
        return f"Activations {self.handle}\n  {span}\n  {size}"

    def html(self) -> str:
        rows = [[s, self.rows, self.widths[s]] for s in self.sites]
        return html_table(
            f"{self.handle}: {bytes_text(self.bytes)} on the server, nothing downloaded",
            ["site", "rows", "width"],
            rows,
        )
