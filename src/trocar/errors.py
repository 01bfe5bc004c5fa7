"""The one error tree: every way Trocar says no, with a code, a path, a reason and a next step.

`CODES` is the closed table of refusals. A `Refusal` is a value that travels (JSON over HTTP, a row in a
plan); a `TrocarError` is the exception that carries one or more of them. The tree:

    TrocarError
      BadRequest        the bytes could not be read as a request            400
      AuthError         no key, or not a valid one                          401
      PolicyRefusal     understood, and not allowed (budget, role, label)   403
      NotFound          absent, expired or somebody else's: the same answer 404
      Conflict          the same idempotency key with another body          409
      ProgramError      a program that the checker does not accept          422
      RunFailed         an accepted program failed while it ran             422
      Overloaded        try again later                                     503
      ServerFault       ours; only a request id leaves                      500
      ClientError       found by the SDK before anything was sent           -

This module knows nothing about HTTP, models or programs. Every code has a page in `docs/errors/`.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Category = Literal["user", "policy", "capacity", "server"]
DOCS_BASE: Final = "docs/errors"
MAX_OPTIONS: Final = 256
MAX_WORD: Final = 80


@dataclass(frozen=True, slots=True)
class Code:
    """One row of the table: what a code means, whatever the request."""

    name: str
    kind: type[TrocarError]
    summary: str
    next_step: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason why something was refused.

    Attributes:
        code: stable name, a key of `CODES`.
        path: where, as a JSON path into the request (`nodes[3].site`) or an argument name.
        reason: one sentence with the offending value in it.
        next_step: what to do now.
        closest: the nearest legal spelling, if there is one.
    """

    code: str
    path: str
    reason: str
    next_step: str
    closest: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "path": self.path,
            "reason": self.reason,
            "next_step": self.next_step,
            "closest": self.closest,
            "docs": f"{DOCS_BASE}/{self.code}.md",
        }

    def __str__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        nearest = f"\n  closest: {self.closest!r}" if self.closest else ""
        return f"[{self.code}]{where}\n  {self.reason}{nearest}\n  next: {self.next_step}\n  {DOCS_BASE}/{self.code}.md"


class TrocarError(Exception):
    """Base of everything Trocar raises on purpose; carries at least one `Refusal`.

    Raised by the SDK as the subclass that the server's answer names, so
    `except trocar.ProgramError as e: e.refusals` is all a caller needs.
    """

    status: int = 500
    category: Category = "server"

    def __init__(self, refusals: Sequence[Refusal], request_id: str | None = None) -> None:
        if not refusals:
            raise ValueError("a TrocarError needs at least one refusal")
        self.refusals: tuple[Refusal, ...] = tuple(refusals)
        self.request_id = request_id
        super().__init__(self._text())

    def _text(self) -> str:
        head = f"{type(self).__name__}" + "".join(
            str(r) if i == 0 else f"\n{r}" for i, r in enumerate(self.refusals)
        )
        return head + (f"\n  request {self.request_id}" if self.request_id else "")

    @property
    def code(self) -> str:
        return self.refusals[0].code

    @property
    def path(self) -> str:
        return self.refusals[0].path

    @property
    def reason(self) -> str:
        return self.refusals[0].reason

    @property
    def next_step(self) -> str:
        return self.refusals[0].next_step

    @property
    def closest(self) -> str | None:
        return self.refusals[0].closest

    @property
    def retryable(self) -> bool:
        return CODES[self.code].retryable

    def as_json(self) -> dict[str, Any]:
        return {
            "error": {
                "kind": type(self).__name__,
                "category": self.category,
                "retryable": self.retryable,
                "request_id": self.request_id,
                "refusals": [r.as_json() for r in self.refusals],
            }
        }


class BadRequest(TrocarError):
    """The bytes could not be read as a request."""

    status, category = 400, "user"


class AuthError(TrocarError):
    """No key, an unknown key, or a revoked one."""

    status, category = 401, "user"


class PolicyRefusal(TrocarError):
    """The request was understood and is not allowed; nothing was spent."""

    status, category = 403, "policy"


class NotFound(TrocarError):
    """Absent, expired, deleted or owned by somebody else: one answer for all four."""

    status, category = 404, "user"


class Conflict(TrocarError):
    """An idempotency key was used before with another body."""

    status, category = 409, "user"


class ProgramError(TrocarError):
    """The checker did not accept the program; no forward pass ran and nothing was charged."""

    status, category = 422, "user"


class RunFailed(TrocarError):
    """An accepted program failed while it ran; neighbours in the batch were not touched."""

    status, category = 422, "user"


class Overloaded(TrocarError):
    """The server is full; try again after the time it names."""

    status, category = 503, "capacity"


class ServerFault(TrocarError):
    """A fault of ours. Nothing but the request id leaves the server."""

    status, category = 500, "server"


class ClientError(TrocarError):
    """Refused by the SDK before anything was sent."""

    status, category = 0, "user"


_TABLE: Final[tuple[Code, ...]] = (
    # reading a request
    Code(
        "bad_json", BadRequest, "The body is not JSON.", "Send UTF-8 JSON, or a Trocar frame made by the SDK."
    ),
    Code(
        "bad_frame",
        BadRequest,
        "The body is not a Trocar frame.",
        "Use trocar.wire.tensors.pack to make the frame.",
    ),
    Code(
        "bad_tensor",
        BadRequest,
        "A tensor in the frame is malformed.",
        "Send dense float32 or float16 tensors of rank 1.",
    ),
    Code("duplicate_key", BadRequest, "A JSON object names the same key twice.", "Keep one of the two keys."),
    Code(
        "not_finite",
        BadRequest,
        "A number is NaN or infinite.",
        "Replace it: check the vector with numpy.isfinite before sending.",
    ),
    Code(
        "too_large",
        BadRequest,
        "The request is larger than this server reads.",
        "Split it into several requests.",
    ),
    Code(
        "unknown_field",
        ProgramError,
        "A field that does not exist.",
        "Remove the field or use the closest spelling.",
    ),
    Code("missing_field", ProgramError, "A required field is absent.", "Add the field."),
    Code(
        "bad_value",
        ProgramError,
        "A value of the wrong type or out of range.",
        "See the reason for what is accepted.",
    ),
    # programs
    Code(
        "unknown_op",
        ProgramError,
        "An op that is not in the table.",
        "`trocar ops` prints the table; docs/programs.md explains it.",
    ),
    Code("unknown_site", ProgramError, "A site that does not exist.", "List the sites with `model.sites`."),
    Code(
        "site_unavailable",
        ProgramError,
        "A site that this model or engine does not serve.",
        "List what is served with `model.sites`.",
    ),
    Code(
        "site_not_editable",
        ProgramError,
        "A site that can be read but not written.",
        "Edit the stream before or after it, for example resid_post.",
    ),
    Code(
        "layer_out_of_range",
        ProgramError,
        "A layer that the model does not have.",
        "Layers count from 0; `model.n_layers` says how many.",
    ),
    Code(
        "bad_position",
        ProgramError,
        "A position selector that cannot be read.",
        "Use prompt[-1], prompt[3:7], prompt[*], gen[*], gen[0:8] or all.",
    ),
    Code(
        "position_out_of_range",
        ProgramError,
        "A position that a prompt does not have.",
        "Shorten the slice, or count from the end: prompt[-1].",
    ),
    Code(
        "unknown_ref",
        ProgramError,
        "A name that no earlier node has.",
        "Define the node before it is used: list order is evaluation order.",
    ),
    Code("duplicate_id", ProgramError, "Two nodes with the same id.", "Give each node its own id."),
    Code(
        "wrong_operand",
        ProgramError,
        "An operand of the wrong kind.",
        "See the op's row in docs/programs.md for what it takes.",
    ),
    Code(
        "width_mismatch",
        ProgramError,
        "A vector whose width is not the site's.",
        "Use a vector of the site's width: `model.width(site)`.",
    ),
    Code(
        "rows_mismatch",
        ProgramError,
        "Two values with different numbers of rows.",
        "Select the same positions on both sides, or take mean() first.",
    ),
    Code(
        "edit_after_layer",
        ProgramError,
        "An edit that needs a value which exists only later in the pass.",
        "Capture the value first and edit in a second program.",
    ),
    Code(
        "touches_nothing",
        ProgramError,
        "An edit or read that selects no token.",
        "Change the selector; with gen[...], raise max_new_tokens above 1.",
    ),
    Code(
        "nothing_returned",
        ProgramError,
        "A program without an output.",
        "Add an output: text, lens, logprobs, score or capture.",
    ),
    Code("too_many_nodes", ProgramError, "A program larger than the server accepts.", "Split the program."),
    Code(
        "too_expensive",
        ProgramError,
        "A program whose static cost is over the limit.",
        "Send fewer prompts, or fewer positions, at a time.",
    ),
    Code(
        "empty_prompt",
        ProgramError,
        "A prompt without tokens, or no prompt.",
        "Send at least one prompt of at least one token.",
    ),
    Code(
        "prompt_too_long",
        ProgramError,
        "A prompt longer than the model's context.",
        "Shorten the prompt or max_new_tokens.",
    ),
    Code(
        "special_token_text",
        ProgramError,
        "A text prompt that spells a special token of the model.",
        "Send messages (the server applies the chat template), or token ids.",
    ),
    Code(
        "not_one_token",
        ProgramError,
        "A string that is not exactly one token.",
        "Use `model.tokenize(text)` and pass the id you mean.",
    ),
    Code(
        "unknown_token",
        ProgramError,
        "A token id outside the vocabulary.",
        "Ids run from 0 to vocab_size - 1.",
    ),
    Code(
        "unknown_tensor",
        ProgramError,
        "A tensor that the request does not carry.",
        "Send the tensor under the name that the node uses.",
    ),
    Code(
        "wrong_handle",
        ProgramError,
        "A handle of the wrong kind, or made on another model.",
        "Use a handle made on this model; `client.handles()` lists yours.",
    ),
    Code(
        "handle_incomplete",
        ProgramError,
        "A handle whose rows are not all there.",
        "Wait for the run to finish; if it failed, run it again.",
    ),
    Code(
        "edit_not_finite",
        RunFailed,
        "An edit produced NaN, an infinity or a value beyond the limit.",
        "Lower the coefficient.",
    ),
    Code(
        "edit_missed",
        RunFailed,
        "An edit or output whose positions the generation never reached.",
        "Use earlier positions, or stop_at_eos=False.",
    ),
    Code(
        "result_not_finite",
        RunFailed,
        "A result is NaN or infinite and cannot be released.",
        "Lower the edits' coefficients; a probe may have met rows far from those it was fitted on.",
    ),
    Code(
        "cancelled",
        RunFailed,
        "The job was cancelled before it ran.",
        "Submit it again if that was not meant.",
    ),
    # fits
    Code(
        "bad_labels",
        ProgramError,
        "Labels that do not fit the rows.",
        "Send one label per prompt (or per row), in prompt order.",
    ),
    Code(
        "too_few_rows",
        ProgramError,
        "Too few rows, or classes, to fit and test.",
        "Capture more rows, or lower test_fraction.",
    ),
    Code(
        "rows_not_finite",
        ProgramError,
        "Stored rows that contain NaN or an infinity.",
        "Leave the site out, or capture it again without the edit that overflowed.",
    ),
    Code("fit_not_converged", RunFailed, "A fit that did not reach its optimum.", "Raise l2."),
    # policy
    Code("no_key", AuthError, "No API key.", "Set TROCAR_API_KEY, or pass Client(api_key=...)."),
    Code("bad_key", AuthError, "A key that is unknown or revoked.", "Ask the operator: `trocar key create`."),
    Code(
        "not_allowed",
        PolicyRefusal,
        "The key's role does not allow this.",
        "Ask the operator for a key with the role that the reason names.",
    ),
    Code(
        "budget_exhausted",
        PolicyRefusal,
        "The program may release more bits than the budget has left.",
        "Release less (lower top_k, fewer rows), or ask the operator for a larger budget.",
    ),
    Code(
        "idempotency_conflict",
        Conflict,
        "An idempotency key that was used for another request.",
        "Use a new key for a new request.",
    ),
    Code(
        "still_running",
        Conflict,
        "The request with this idempotency key has not finished.",
        "Wait, then send it again with the same key.",
        retryable=True,
    ),
    Code(
        "limit_changed",
        PolicyRefusal,
        "A budget whose size is not the one it was opened with.",
        "Restore the numbers that the reason names: configuration never moves an open budget.",
    ),
    # things that are not there
    Code(
        "unknown_model",
        NotFound,
        "A model that this server does not serve.",
        "`client.models()` lists the served models.",
    ),
    Code("handle_not_found", NotFound, "No such handle.", "`client.handles()` lists yours."),
    Code("key_not_found", NotFound, "No such key.", "`trocar key list` lists the keys."),
    Code("job_not_found", NotFound, "No such job, or its result has expired.", "Submit the program again."),
    Code(
        "no_route", NotFound, "No such address on this server.", "See /docs on the server for the addresses."
    ),
    # capacity and faults
    Code(
        "queue_full",
        Overloaded,
        "Too many requests are waiting.",
        "Try again after a few seconds.",
        retryable=True,
    ),
    Code(
        "disk_full",
        Overloaded,
        "The store cannot take more rows.",
        "Delete handles you no longer need.",
        retryable=True,
    ),
    Code("internal", ServerFault, "A fault of ours.", "Send the request id to the operator."),
    Code(
        "ledger_unavailable",
        ServerFault,
        "The ledger cannot be written, so nothing may leave.",
        "Send the request id to the operator.",
        retryable=True,
    ),
    Code(
        "store_damaged",
        ServerFault,
        "A stored file is not the one that was written.",
        "Send the request id to the operator, who runs `trocar doctor`.",
    ),
    Code(
        "bad_bits",
        ServerFault,
        "An amount of bits that the ledger does not accept.",
        "Send the request id to the operator.",
    ),
    Code(
        "reservation_closed",
        ServerFault,
        "A reservation that was already settled, cancelled or recovered.",
        "Send the request id to the operator.",
    ),
    # models on disk
    Code("model_not_pulled", NotFound, "The model is not in the cache.", "Run `trocar model pull NAME`."),
    Code(
        "pull_failed",
        RunFailed,
        "The model could not be obtained or converted.",
        "Check the network, then run `trocar model pull` again.",
    ),
    Code(
        "checksum_mismatch",
        RunFailed,
        "The downloaded file is not the one we know.",
        "Delete it and pull again; if it persists, report it.",
    ),
    Code(
        "model_unsupported",
        RunFailed,
        "The architecture has no site adapter, or failed its own validation.",
        "See docs/models.md for the families served.",
    ),
    # the SDK
    Code(
        "unreachable",
        ClientError,
        "No server answers.",
        "Start one with `trocar serve`, or set TROCAR_URL.",
        retryable=True,
    ),
    Code(
        "bad_argument",
        ClientError,
        "An argument that the SDK does not understand.",
        "See the reason for what is accepted.",
    ),
    Code(
        "not_here",
        ClientError,
        "A value that lives on the server and cannot be used as a local array.",
        "Reduce it on the server (lens, score, fit) or capture it as a handle.",
    ),
    # the command line
    Code(
        "unknown_command",
        ClientError,
        "A command that does not exist.",
        "`trocar --help` lists the commands.",
    ),
    Code(
        "missing_extra",
        ClientError,
        "A package that this part of Trocar needs is not installed.",
        "Run `pip install 'trocar[server]'`.",
    ),
    Code(
        "no_ledger",
        NotFound,
        "The data folder holds no ledger.",
        "Start `trocar serve` once, or name the right folder with --data.",
    ),
    Code(
        "data_unwritable",
        ClientError,
        "The data folder cannot be written.",
        "Name a folder of your own with --data or TROCAR_DATA.",
    ),
    Code(
        "cannot_listen",
        ClientError,
        "The address is taken or is not one of this machine's.",
        "Choose another --port; 0 picks a free one.",
    ),
)
CODES: Final[dict[str, Code]] = {row.name: row for row in _TABLE}
_KINDS: Final[dict[str, type[TrocarError]]] = {
    k.__name__: k
    for k in (
        BadRequest,
        AuthError,
        PolicyRefusal,
        NotFound,
        Conflict,
        ProgramError,
        RunFailed,
        Overloaded,
        ServerFault,
        ClientError,
    )
}


def refusal(
    code: str, path: str, reason: str, *, closest: str | None = None, next_step: str | None = None
) -> Refusal:
    """Makes a `Refusal`; the next step defaults to the code's own."""
    return Refusal(code, path, reason, next_step or CODES[code].next_step, closest)


def refuse(
    code: str, path: str, reason: str, *, closest: str | None = None, next_step: str | None = None
) -> TrocarError:
    """Makes the exception of the class that `code` belongs to, for `raise refuse(...)`."""
    return CODES[code].kind([refusal(code, path, reason, closest=closest, next_step=next_step)])


def closest(word: str, options: Iterable[str]) -> str | None:
    """The nearest of the first `MAX_OPTIONS` options to `word`, or None when nothing is near."""
    near = list(itertools.islice(options, MAX_OPTIONS))
    found = difflib.get_close_matches(word[:MAX_WORD], near, n=1, cutoff=0.6)
    return found[0] if found else None


def from_json(body: dict[str, Any], request_id: str | None = None) -> TrocarError:
    """Rebuilds the exception that a server described with `TrocarError.as_json`."""
    error = body["error"]
    kind = _KINDS.get(error["kind"], ServerFault)
    refusals = [
        Refusal(
            r["code"] if r["code"] in CODES else "internal",
            r["path"],
            r["reason"],
            r["next_step"],
            r["closest"],
        )
        for r in error["refusals"]
    ]
    return kind(refusals, error.get("request_id") or request_id)
