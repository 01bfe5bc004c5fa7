"""The session use case: programs one after another in one job, with values that never leave the server.

All steps are checked and priced before the first one runs: what a step captures is known from its check, so a
later step that reads it as `step0.name` is checked against rows that do not exist yet. One job, one hold, one
bill. What a session captured is deleted at its end unless it is to be kept; when it fails, always.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trocar import errors
from trocar.engine.protocol import F32
from trocar.gate.gate import Gate, Hold
from trocar.gate.handles import Handles
from trocar.gate.release import Released
from trocar.graph import check, ops
from trocar.graph.cost import Cost, Prices
from trocar.graph.facts import HandleFacts
from trocar.graph.program import Node
from trocar.service.ending import Ending
from trocar.service.jobs import Job, Jobs
from trocar.service.prepare import Prepared, Vectors, prepare
from trocar.service.steps import Ran, Request
from trocar.service.worker import Model
from trocar.wire.requests import RunRequest, SessionRequest

_STEP: Final = re.compile(r"step([0-9]{1,2})\.(.+)")


# ---- before anything runs -------------------------------------------------------------------------


def prepare_session(
    request: SessionRequest, vectors: Vectors, model: Model, handles: Handles, tenant: str, prices: Prices
) -> tuple[Prepared, ...]:
    """Checks and prices every step, in order, up to the first that is refused.

    Raises:
        ProgramError: everything the checker finds in that step, with the step in the path.
    """
    mine = _vectors(request, vectors)
    steps: list[Prepared] = []
    promised: dict[str, HandleFacts] = {}
    for i, step in enumerate(request.steps):
        try:
            _require_model(step, model)
            _require_names(step, i, steps, promised)
            steps.append(prepare(step, mine[i], model, handles, tenant, prices, promised))
        except errors.TrocarError as e:
            raise type(e)([_within(i, refusal) for refusal in e.refusals]) from None
        promised |= dict(_promises(i, steps[i], model))
    return tuple(steps)


def _within(step: int, refusal: errors.Refusal) -> errors.Refusal:
    path = f"steps[{step}].{refusal.path}" if refusal.path else f"steps[{step}]"
    return errors.Refusal(refusal.code, path, refusal.reason, refusal.next_step, refusal.closest)


def _vectors(request: SessionRequest, vectors: Vectors) -> list[dict[str, F32]]:
    """The arrays of each step, under the names that its program uses."""
    found: list[dict[str, F32]] = [{} for _ in request.steps]
    for name, array in vectors.items():
        match = _STEP.fullmatch(name)
        if match is None or int(match[1]) >= len(found):
            raise errors.refuse(
                "unknown_tensor", f"tensors.{name[:64]}", f"{name[:64]!r} belongs to no step of this session",
                next_step="Name the arrays of step 0 step0.NAME, and so on.",
            )  # fmt: skip
        found[int(match[1])][match[2]] = array
    return found


def _require_model(step: RunRequest, model: Model) -> None:
    if step.model != model.facts.name:
        raise errors.refuse(
            "bad_value", "model", f"{step.model!r} is not the model of the first step, {model.facts.name!r}",
            next_step="Use one model in a session; hand values of another on as handles.",
        )  # fmt: skip


def _require_names(
    step: RunRequest, index: int, before: Sequence[Prepared], promised: Mapping[str, HandleFacts]
) -> None:
    """Refuses a `step0.name` that will not be there, with the reason."""
    found = []
    for i, node in enumerate(step.program.nodes):
        name, field = _handle_of(node)
        match = _STEP.fullmatch(name)
        if match is not None and name not in promised:
            found.append(_absent(int(match[1]), match[2], index, before, f"program.nodes[{i}].{field}"))
    if found:
        raise errors.ProgramError(found[: check.MAX_REFUSALS])


def _handle_of(node: Node) -> tuple[str, str]:
    if isinstance(node, ops.Score):
        return node.probe or "", "probe"
    return (node.handle, "handle") if isinstance(node, ops.Stored | ops.Vector) else ("", "")


def _absent(step: int, name: str, here: int, before: Sequence[Prepared], path: str) -> errors.Refusal:
    if step >= here:
        return errors.refusal(
            "handle_not_found", path, f"step {step} does not run before step {here}",
            next_step="Name a capture of an earlier step; steps count from 0.",
        )  # fmt: skip
    captures = [n.id for n in before[step].variants[0].checked.outputs() if isinstance(n, ops.Capture)]
    if name not in captures:
        near = errors.closest(name, captures)
        return errors.refusal(
            "handle_not_found", path, f"step {step} captures nothing under {name!r}",
            closest=None if near is None else f"step{step}.{near}",
            next_step=f"Name one of its captures: {', '.join(captures) or 'it has none'}.",
        )  # fmt: skip
    if before[step].request.sweep:
        return errors.refusal(
            "wrong_handle", path, f"step {step} is a sweep: each of its variants captures {name!r}",
            next_step="Capture in a step without a sweep.",
        )  # fmt: skip
    return errors.refusal(
        "wrong_handle", path, f"{name!r} of step {step} holds rows of generated tokens, whose number is not known "
        "before it runs",
        next_step="Capture prompt[...] rows, or use the handle in a request of its own.",
    )  # fmt: skip


def _promises(index: int, step: Prepared, model: Model) -> Iterator[tuple[str, HandleFacts]]:
    """Facts of what a step will have captured, where they are known."""
    if step.request.sweep:
        return
    checked = step.variants[0].checked
    for node in checked.outputs():
        if not isinstance(node, ops.Capture):
            continue
        values = [checked.values[ref] for ref in node.of]
        if values[0].gen:
            continue
        counts = values[0].counts
        yield (
            f"step{index}.{node.id}",
            HandleFacts(
                handle=f"step{index}.{node.id}",
                kind="activations",
                fingerprint=model.facts.fingerprint,
                widths={str(v.sites[0]): v.width for v in values},
                rows_per_prompt=counts if node.reduce == "none" else (1,) * len(counts),
            ),
        )


def session_cost(steps: Sequence[Cost]) -> Cost:
    """The sum over the steps, with one overhead; the prices of step i stand under `stepi.`."""
    bits = {"overhead": steps[0].bits_out["overhead"]}
    for i, step in enumerate(steps):
        bits |= {f"step{i}.{name}": n for name, n in step.bits_out.items() if name != "overhead"}
    return Cost(
        tokens=sum(c.tokens for c in steps),
        rows_read=sum(c.rows_read for c in steps),
        flops=sum(c.flops for c in steps),
        bytes_stored=sum(c.bytes_stored for c in steps),
        bits_out=bits,
        total_bits=sum(bits.values()),
        download_bits=sum(c.download_bits for c in steps),
    )


# ---- the job --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Session:
    """One admitted session; `work` is what its job does."""

    requests: tuple[Request, ...]
    keep: bool
    model: Model
    gate: Gate
    jobs: Jobs
    tenant: str
    hold: Hold

    def work(self, job: Job) -> Released:
        ids = tuple(handle for request in self.requests for handle in request.ids)
        end = Ending(self.gate, self.hold, self.jobs.tick(job), self.model.worker, self.tenant, ids)
        try:
            ran = self._run(job)
            if not self.keep:  # before the release: what follows it cannot be undone
                end.erase()
            steps, cost, keep = [each.step for each in ran], self.hold.cost, self.keep
            made = [handle for each in ran for handle in each.captured] if keep else []
            return end.release(lambda press: press.session(steps, cost, keep=keep), made)
        except BaseException as e:
            end.undo(e)
            raise

    def _run(self, job: Job) -> list[Ran]:
        """Every step; what one captured is nobody's handle before the whole session is charged."""
        made: dict[str, str] = {}
        ran, before = list[Ran](), 0
        for i, request in enumerate(self.requests):
            ran.append(request.run(self.jobs.watch(job, before), made, begun=before > 0))
            made |= {f"step{i}.{name}": handle for name, handle in request.handles[0].items()}
            before += request.prepared.sequences
        return ran
