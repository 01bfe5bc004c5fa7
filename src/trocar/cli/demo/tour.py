"""The five experiments of the tour, each a function from clients to a `Chapter` with figures and checks.

Only the SDK is used, as a researcher at a distance would: no weight, no activation and no code crosses.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trocar.cli.demo import data
from trocar.client import edit
from trocar.client.results import Results
from trocar.client.sync import Activations, Client, Job, Model
from trocar.graph.builder import EditSpec
from trocar.plots import Figure, Heatmap, Line, Lines
from trocar.plots.page import Check

COEFS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
STEER_LAYER = 14
RANDOM_VECTORS = 4
SUBJECT, LAST = -2, -1
TRIES = 60
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chapter:
    """One experiment: what was asked, what was found, how much left the server.

    Attributes:
        download_bits: what the activations it worked on would have been as a bf16 download.
    """

    heading: str
    paragraphs: tuple[str, ...]
    figures: tuple[Figure, ...]
    checks: tuple[Check, ...]
    download_bits: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A chapter with its time and what the ledger charged for it."""

    chapter: Chapter
    seconds: float
    bits: int


def _as_bf16(rows: int, width: int) -> int:
    """Bits of that many activation rows as a bf16 download."""
    return rows * width * 16


def logit_lens(model: Model) -> Chapter:
    """What the residual stream would say after each layer (nostalgebraist 2020)."""
    prompt = "The Eiffel Tower is located in the city of"
    with model.trace(prompt, max_new_tokens=1) as t:
        t.save("lens", t.lens(t.resid_post[:]["prompt[*]"], top_k=3))
        t.save("text", t.text())
    plan, results = t.plan(), t.run().result()
    lens, text = results["lens"], results["text"][0]
    top, said = lens.texts[-1][-1][0], str(text)
    return Chapter(
        "Logit lens",
        (
            (
                f"One program reads the residual stream of {prompt!r} after every layer and sends back the three most "
                "likely next tokens of each row. The unembedding matrix is an operand on the server, never a result."
            ),
        ),
        (lens.heatmap(),),
        (
            Check(
                "Lens after the last layer equals the model's own next token",
                repr(top),
                repr(said),
                top == said,
            ),
        ),
        plan.view.cost.download_bits,
    )


def truth_probe(model: Model, n_cities: int) -> Chapter:
    """Where the model knows whether a statement about a city is true (Marks & Tegmark 2023)."""
    statements = data.city_statements(n_cities)
    acts = model.capture(statements.texts, "resid_post.*", at=-1)
    probe = acts.fit("logistic", statements.labels, groups=statements.cities)
    auroc = list(probe.metric("auroc").values())
    early, middle = max(auroc[:9]), max(auroc[12:25])
    best = 12 + int(np.argmax(auroc[12:25]))
    first = next((i for i, x in enumerate(auroc) if x > 0.9), "none")
    return Chapter(
        "Truth probe by layer",
        (
            (
                f"{len(statements.texts)} statements ('The city of X is in Y.', each of {n_cities} cities once true "
                f"and once false) were captured at the last token of every layer: {acts.rows * len(acts.sites)} rows "
                "that stayed on the server. One logistic probe per layer was fitted there; train and test share no "
                "city."
            ),
            (
                f"The first layer above 0.9 is {first}. Below 0.5 is what layers that cannot tell do here: each city's "
                "true and false statement are twins, so a probe that remembers the country of one is wrong about the "
                "other."
            ),
        ),
        (probe.lines("auroc"),),
        (
            Check(
                "AUROC at the best layer of 12-24", f"{middle:.3f} (layer {best})", ">= 0.92", middle >= 0.92
            ),
            Check("AUROC at the best layer of 0-8", f"{early:.3f}", "<= 0.75", early <= 0.75),
        ),
        _as_bf16(len(statements.texts) * model.n_layers, model.d_model),
    )


def steering(model: Model) -> Chapter:
    """A difference of means as a steering vector, against random vectors of its norm (Rimsky et al. 2023)."""
    sentences = data.sentiment()
    site = f"resid_post.{STEER_LAYER}"
    acts = model.capture(sentences.texts, site, at=-1)
    probe = acts.fit("mean_diff", sentences.labels, groups=sentences.adjectives)
    norm = probe.metrics[site]["direction_norm"]
    direction = [_verdict(model, edit.add(site, probe.direction, coef=c, at=-1)) for c in COEFS]
    stream = np.random.default_rng(0)
    random = np.array(
        [_dose(model, site, _unit(stream, model.d_model) * norm) for _ in range(RANDOM_VECTORS)]
    )
    return Chapter(
        "Steering: dose and response",
        (
            (
                f"The difference of means between {sum(sentences.labels)} good and as many bad sentences at layer "
                f"{STEER_LAYER} was added to the last token of {len(data.OPENINGS)} neutral openings, with "
                f"coefficients from -2 to 2. The response is the log-odds of {data.VERDICTS[0]!r} against "
                f"{data.VERDICTS[1]!r}. The direction never left the server; its norm did, so that {RANDOM_VECTORS} "
                "random vectors of the same norm could be sent as a control."
            ),
        ),
        (_dose_response(site, direction, random),),
        _steering_checks(direction, random),
        _as_bf16(len(sentences.texts), model.d_model),
    )


def _dose_response(site: str, direction: Sequence[float], random: Values) -> Lines:
    mean, low, high = random.mean(0).tolist(), random.min(0).tolist(), random.max(0).tolist()
    return Lines(
        [
            Line("difference of means", COEFS, direction),
            Line("random, same norm", COEFS, mean, low, high, dashed=True),
        ],
        f"Dose-response at {site}",
        "coefficient",
        f"log-odds {data.VERDICTS[0]!r} over {data.VERDICTS[1]!r} (nats)",
        band_title="range over random vectors",
    )


def _steering_checks(direction: Sequence[float], random: Values) -> tuple[Check, ...]:
    span, control = direction[-1] - direction[0], float(np.abs(random[:, -1] - random[:, 0]).mean())
    monotone = all(a < b for a, b in pairwise(direction))
    share = control / span
    return (
        Check("Response is monotone in the coefficient", str(monotone), "True", monotone),
        Check("Range of the response", f"{span:.2f} nats", ">= 3 nats", span >= 3),
        Check("Random control, share of that range", f"{share:.0%}", "<= 30 %", 0 <= share <= 0.3),
    )


def _unit(stream: np.random.Generator, width: int) -> Values:
    vector = stream.standard_normal(width)
    unit: Values = vector / np.linalg.norm(vector)
    return unit


def _dose(model: Model, site: str, vector: Values) -> list[float]:
    return [_verdict(model, edit.add(site, vector, coef=c, at=-1)) for c in COEFS]


def _verdict(model: Model, change: EditSpec) -> float:
    with model.trace(data.OPENINGS) as t:
        t.apply(change)
        t.save("verdict", t.logprobs(data.VERDICTS))
    return float(t.run().result()["verdict"].diff().mean())


def patching(model: Model) -> Chapter:
    """Activation patching: which state carries the country to the answer (Vig et al. 2020, Meng et al. 2022)."""
    facts = data.capitals(lambda text: len(model.tokenize(text)))
    corrupt = facts.prompts[1:] + facts.prompts[:1]
    wrong = facts.answers[1:] + facts.answers[:1]
    pairs = list(zip(facts.answers, wrong, strict=True))
    sources = {at: model.capture(facts.prompts, "resid_post.*", at=at) for at in (SUBJECT, LAST)}
    clean, corrupted = (_difference(model, p, pairs) for p in (facts.prompts, corrupt))
    jobs = {
        (at, layer): _patch(model, corrupt, pairs, f"resid_post.{layer}", sources[at], at)
        for layer in range(model.n_layers)
        for at in (SUBJECT, LAST)
    }
    patched = {key: float(job.result()["ld"].diff().mean()) for key, job in jobs.items()}
    share = {key: (value - corrupted) / (clean - corrupted) for key, value in patched.items()}
    grid = np.array([[share[at, layer] for at in (SUBJECT, LAST)] for layer in range(model.n_layers)])
    moves = int(np.argmax(grid[:, 1] > grid[:, 0]))
    return Chapter(
        "Activation patching",
        (
            (
                f"{len(facts.prompts)} prompts 'The capital of X is' were run with another country; one residual row "
                "of the run with the right country was put in at each layer and position. Recovered: 0 is the wrong "
                f"run, 1 the right one, measured on the log-odds of the two capitals ({clean:.2f} against "
                f"{corrupted:.2f} nats). {len(jobs)} different programs shared the forward passes."
            ),
            f"The subject token carries the country up to layer {moves - 1}; from then on the last token has it.",
        ),
        (
            Heatmap(
                grid.tolist(),
                ["country (subject)", "is (last)"],
                [str(i) for i in range(model.n_layers)],
                title="Recovered log-odds when one residual row is patched",
                x_title="patched token",
                y_title="layer",
                value_title="recovered",
                diverging=True,
                vmin=-1.0,
                vmax=1.0,
            ),
        ),
        _patching_checks(grid),
        _as_bf16(2 * len(facts.prompts) * model.n_layers, model.d_model),
    )


Pairs = Sequence[tuple[str, str]]


def _patching_checks(grid: Values) -> tuple[Check, ...]:
    subject, last = float(grid[2:21, 0].min()), float(grid[26:, 1].min())
    reverse = max(float(np.abs(grid[26:, 0]).max()), float(np.abs(grid[2:21, 1]).max()))
    return (
        Check("Subject, layers 2-20: recovered", f"{subject:.3f} at least", ">= 0.9", subject >= 0.9),
        Check("Last token, layers 26 on: recovered", f"{last:.3f} at least", ">= 0.9", last >= 0.9),
        Check("The reverse of both", f"{reverse:.3f} at most", "<= 0.1", reverse <= 0.1),
    )


def _difference(model: Model, prompts: Sequence[str], pairs: Pairs) -> float:
    with model.trace(prompts) as t:
        t.save("ld", t.logprobs(pairs))
    return float(t.run().result()["ld"].diff().mean())


def _patch(
    model: Model, prompts: Sequence[str], pairs: Pairs, site: str, source: Activations, at: int
) -> Job[Results[Activations]]:
    with model.trace(prompts) as t:
        t.apply(edit.set(site, source[site], at=at))
        t.save("ld", t.logprobs(pairs))
    return t.run()


def two_users(first: Model, second: Model, forwards: Callable[[], int]) -> Chapter:
    """Two strangers' programs in one batch, against each alone."""
    vector = np.random.default_rng(1).standard_normal(first.d_model) * 20
    ask_first = (data.OPENINGS, (edit.add("resid_post.8", vector),))
    ask_second = (
        ("The Nile flows through", "Water boils at a temperature of"),
        (edit.scale("mlp_out.1", 0.0),),
    )
    alone = [_top(model, *ask) for model, ask in ((first, ask_first), (second, ask_second))]
    plain = _top(second, ask_second[0], ())
    together, passes = alone, 2
    for _ in range(TRIES):
        before = forwards()
        together = _at_once(((first, ask_first), (second, ask_second)))
        passes = forwards() - before
        if passes == 1:
            break
    largest = max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True))
    effect = float(np.abs(alone[1] - plain).max())
    return Chapter(
        "Two users, one batch",
        (
            (
                "Two keys of two tenants sent different programs at the same moment: one adds a vector at layer 8, the "
                "other silences the MLP of layer 1. The server put them into one forward pass; each got the numbers it "
                "gets alone."
            ),
        ),
        (),
        (
            Check("Forward passes for both requests together", str(passes), "1", passes == 1),
            Check("Largest difference from running alone", f"{largest:.1e} nats", "<= 1e-4", largest <= 1e-4),
            Check("The edit itself changes the answer by", f"{effect:.2f} nats", ">= 0.1", effect >= 0.1),
        ),
        0,
    )


Ask = tuple[Sequence[str], Sequence[EditSpec]]


def _top(model: Model, prompts: Sequence[str], edits: Sequence[EditSpec]) -> Values:
    """Log-probabilities of two common continuations after each prompt."""
    with model.trace(prompts) as t:
        t.apply(*edits)
        t.save("lp", t.logprobs([" the", " a"]))
    values: Values = t.run().result()["lp"].values
    return values


def _at_once(asks: Sequence[tuple[Model, Ask]]) -> list[Values]:
    found: list[Values] = [np.zeros(0)] * len(asks)
    barrier = threading.Barrier(len(asks))

    def ask(i: int, model: Model, wanted: Ask) -> None:
        barrier.wait()
        found[i] = _top(model, *wanted)

    threads = [threading.Thread(target=ask, args=(i, *pair)) for i, pair in enumerate(asks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@dataclass(frozen=True, slots=True)
class Guests:
    """The tour's three keys: two researchers of different tenants, and the operator."""

    first: Client
    second: Client
    operator: Client

    def spent_bits(self, model: str) -> int:
        """What the ledger has charged both researchers for this model."""
        return sum(c.ledger().budgets[model].spent_bits for c in (self.first, self.second))


def take(guests: Guests, model_name: str, n_cities: int, show: Callable[[Taken], None]) -> list[Taken]:
    """Runs the chapters in order and shows each as it ends."""
    model, other = guests.first.model(model_name), guests.second.model(model_name)
    steps: tuple[Callable[[], Chapter], ...] = (
        lambda: logit_lens(model),
        lambda: truth_probe(model, n_cities),
        lambda: steering(model),
        lambda: patching(model),
        lambda: two_users(model, other, lambda: guests.operator.engine().forwards),
    )
    taken = []
    for step in steps:
        started_s, spent = time.monotonic(), guests.spent_bits(model_name)
        chapter = step()
        taken.append(Taken(chapter, time.monotonic() - started_s, guests.spent_bits(model_name) - spent))
        show(taken[-1])
    return taken
