"""The closed table of refusals: every code, the class of exception it belongs to, what it means, what to do.

A code exists when it has a row here and a page in `docs/errors/`. This module is data; the classes that the
rows name are in `trocar.errors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal[
    "BadRequest",
    "AuthError",
    "PolicyRefusal",
    "NotFound",
    "Conflict",
    "ProgramError",
    "RunFailed",
    "Overloaded",
    "ServerFault",
    "ClientError",
]


@dataclass(frozen=True, slots=True)
class Code:
    """One row: what a code means, whatever the request.

    Attributes:
        kind: name of the exception in `trocar.errors`.
        retryable: whether the same request may succeed later.
    """

    name: str
    kind: Kind
    summary: str
    next_step: str
    retryable: bool = False


# fmt: off
TABLE: Final[tuple[Code, ...]] = (
    # reading a request
    Code("bad_http", "BadRequest", "What was sent is not an HTTP request.", "Send HTTP/1.1, or let a library do it."),
    Code("bad_json", "BadRequest", "The body is not JSON.", "Send UTF-8 JSON, or a Trocar frame made by the SDK."),
    Code("bad_frame", "BadRequest", "The body is not a Trocar frame.",
         "Use trocar.wire.tensors.pack to make the frame."),
    Code("bad_tensor", "BadRequest", "A tensor in the frame is malformed.",
         "Send dense float32 or float16 arrays of one or two dimensions."),
    Code("duplicate_key", "BadRequest", "A JSON object names the same key twice.", "Keep one of the two keys."),
    Code("not_finite", "BadRequest", "A number is NaN or infinite.",
         "Replace it: check the vector with numpy.isfinite before sending."),
    Code("too_large", "BadRequest", "The request is larger than this server reads.",
         "Split it into several requests."),
    Code("unknown_field", "ProgramError", "A field that does not exist.",
         "Remove the field or use the closest spelling."),
    Code("missing_field", "ProgramError", "A required field is absent.", "Add the field."),
    Code("bad_value", "ProgramError", "A value of the wrong type or out of range.",
         "See the reason for what is accepted."),
    # programs
    Code("unknown_op", "ProgramError", "An op that is not in the table.",
         "`trocar ops` prints the table; docs/programs.md explains it."),
    Code("unknown_site", "ProgramError", "A site that does not exist.", "List the sites with `model.sites`."),
    Code("ambiguous_site", "ProgramError", "A foreign spelling that means more than one site.",
         "Write the canonical name of the one you mean: docs/aliases.md lists them."),
    Code("site_unavailable", "ProgramError", "A site that this model or engine does not serve.",
         "List what is served with `model.sites`."),
    Code("site_not_editable", "ProgramError", "A site that can be read but not written.",
         "Edit the stream before or after it, for example resid_post."),
    Code("layer_out_of_range", "ProgramError", "A layer that the model does not have.",
         "Layers count from 0; `model.n_layers` says how many."),
    Code("bad_position", "ProgramError", "A position selector that cannot be read.",
         "Use prompt[-1], prompt[3:7], prompt[1,4], prompt[*], gen[0:8], all, span(\"text\"), role(\"user\") or "
         "mask(\"name\")."),
    Code("position_out_of_range", "ProgramError", "A position that a prompt does not have.",
         "Shorten the slice, or count from the end: prompt[-1]."),
    Code("unknown_ref", "ProgramError", "A name that no earlier node has.",
         "Define the node before it is used: list order is evaluation order."),
    Code("duplicate_id", "ProgramError", "Two nodes with the same id.", "Give each node its own id."),
    Code("wrong_operand", "ProgramError", "An operand of the wrong kind.",
         "See the op's row in docs/programs.md for what it takes."),
    Code("width_mismatch", "ProgramError", "A vector whose width is not the site's.",
         "Use a vector of the site's width: `model.width(site)`."),
    Code("rows_mismatch", "ProgramError", "Two values with different numbers of rows.",
         "Select the same positions on both sides, or take mean() first."),
    Code("edit_after_layer", "ProgramError", "An edit that needs a value which exists only later in the pass.",
         "Capture the value first and edit in a second program."),
    Code("touches_nothing", "ProgramError", "An edit or read that selects no token.",
         "Change the selector; with gen[...], raise max_new_tokens above 1."),
    Code("no_keys_left", "ProgramError", "A knockout that leaves a query nothing to attend to.",
         "Leave it a key: a token may always attend to itself."),
    Code("after_stop", "ProgramError", "A node that needs what a stop leaves uncomputed, or a second stop.",
         "Stop after a later layer, or leave stop_after out."),
    Code("nothing_returned", "ProgramError", "A program without an output.",
         "Add an output: text, lens, logprobs, score or capture."),
    Code("too_many_nodes", "ProgramError", "A program larger than the server accepts.", "Split the program."),
    Code("too_expensive", "ProgramError", "A program whose static cost is over the limit.",
         "Send fewer prompts, or fewer positions, at a time."),
    Code("empty_prompt", "ProgramError", "A prompt without tokens, or no prompt.",
         "Send at least one prompt of at least one token."),
    Code("prompt_too_long", "ProgramError", "A prompt longer than the model's context.",
         "Shorten the prompt or max_new_tokens."),
    Code("special_token_text", "ProgramError", "A text prompt that spells a special token of the model.",
         "Send messages (the server applies the chat template), or token ids."),
    Code("not_one_token", "ProgramError", "A string that is not exactly one token.",
         "Use `model.tokenize(text)` and pass the id you mean."),
    Code("unknown_token", "ProgramError", "A token id outside the vocabulary.", "Ids run from 0 to vocab_size - 1."),
    Code("unknown_tensor", "ProgramError", "A tensor that the request does not carry.",
         "Send the tensor under the name that the node uses."),
    Code("wrong_handle", "ProgramError", "A handle of the wrong kind, or made on another model.",
         "Use a handle made on this model; `client.handles()` lists yours."),
    Code("handle_incomplete", "ProgramError", "A handle whose rows are not all there.",
         "Wait for the run to finish; if it failed, run it again."),
    Code("edit_not_finite", "RunFailed", "An edit produced NaN, an infinity or a value beyond the limit.",
         "Lower the coefficient."),
    Code("edit_missed", "RunFailed", "An edit or output whose positions the generation never reached.",
         "Use earlier positions, or stop_at_eos=False."),
    Code("result_not_finite", "RunFailed", "A result is NaN or infinite and cannot be released.",
         "Lower the edits' coefficients; a probe may have met rows far from those it was fitted on."),
    Code("cancelled", "RunFailed", "The job was cancelled before it ran.", "Submit it again if that was not meant."),
    # fits
    Code("bad_labels", "ProgramError", "Labels that do not fit the rows.",
         "Send one label per prompt (or per row), in prompt order."),
    Code("too_few_rows", "ProgramError", "Too few rows, or classes, to fit and test.",
         "Capture more rows, or lower test_fraction."),
    Code("rows_not_finite", "ProgramError", "Stored rows that contain NaN or an infinity.",
         "Leave the site out, or capture it again without the edit that overflowed."),
    Code("bad_dictionary", "ProgramError", "Files that are no dictionary, or do not fit each other.",
         "Save it again with SAELens 6, as cfg.json and sae_weights.safetensors in one folder."),
    Code("fit_not_converged", "RunFailed", "A fit that did not reach its optimum.", "Raise l2."),
    # policy
    Code("no_key", "AuthError", "No API key.", "Set TROCAR_API_KEY, or pass Client(api_key=...)."),
    Code("bad_key", "AuthError", "A key or token that is unknown, expired or revoked.",
         "Ask the operator: `trocar key create`."),
    Code("not_allowed", "PolicyRefusal", "The key's role does not allow this.",
         "Ask the operator for a key with the role that the reason names."),
    Code("policy", "PolicyRefusal", "A structure rule of the policy forbids this.",
         "Work on the rows where they are: capture, fit, score; the reason names the rule."),
    Code("needs_airlock", "PolicyRefusal", "Rows of secret weights do not leave in an answer.",
         "Capture them and work on the handle, or ask for an export: client.request_release(handle, ...)."),
    Code("out_of_scope", "PolicyRefusal", "The key or token is not meant for this.",
         "Stay inside its scope, or ask whoever gave it to you for a wider one."),
    Code("budget_exhausted", "PolicyRefusal", "The program may release more bits than the budget has left.",
         "Release less (lower top_k, fewer rows), or ask the operator for a larger budget."),
    Code("rank_exhausted", "PolicyRefusal", "The program sends more new directions into a site than are left.",
         "Use directions sent before (they are free), send fewer, or use another site."),
    Code("lineage_frozen", "PolicyRefusal", "The operator has frozen this model's lineage.",
         "Ask the operator; nothing is admitted or released for it until it is thawed."),
    Code("idempotency_conflict", "Conflict", "An idempotency key that was used for another request.",
         "Use a new key for a new request."),
    Code("still_running", "Conflict", "The request with this idempotency key has not finished.",
         "Wait, then send it again with the same key.", retryable=True),
    Code("replay_expired", "Conflict", "A request whose answer was given, and is no longer kept to be given again.",
         "Send it under a new idempotency key; it is a new request and costs what it costs."),
    Code("policy_loosened", "PolicyRefusal", "A policy that lets more leave than the last one, and was not approved.",
         "Two people approve the file with `trocar policy approve`, an owner among them."),
    Code("bad_policy", "ProgramError", "A policy file that cannot be used.",
         "Correct the place that the path names; `trocar policy explain` says what each setting means."),
    Code("limit_changed", "PolicyRefusal", "A budget whose size is not the one it was opened with.",
         "Restore the numbers that the reason names: configuration never moves an open budget."),
    Code("export_refused", "PolicyRefusal", "What was to leave did not pass the automatic checks.",
         "Leave out what the reasons name; no approval can replace a check."),
    Code("airlock_state", "Conflict", "A step that this request cannot take now.",
         "`trocar airlock show` says where the request stands."),
    # things that are not there
    Code("unknown_model", "NotFound", "A model that this server does not serve.",
         "`client.models()` lists the served models."),
    Code("handle_not_found", "NotFound", "No such handle.", "`client.handles()` lists yours."),
    Code("key_not_found", "NotFound", "No such key.", "`trocar key list` lists the keys."),
    Code("job_not_found", "NotFound", "No such job, or its result has expired.", "Submit the program again."),
    Code("airlock_not_found", "NotFound", "No such request in the airlock.",
         "`trocar airlock list` lists those that you can see."),
    Code("no_route", "NotFound", "No such address on this server.", "See /docs on the server for the addresses."),
    # capacity and faults
    Code("queue_full", "Overloaded", "Too many requests are waiting.",
         "Try again after a few seconds.", retryable=True),
    Code("too_many_refusals", "Overloaded", "Too many requests of this key were refused in a short time.",
         "Wait, and check requests with plan() before sending more.", retryable=True),
    Code("disk_full", "Overloaded", "The store cannot take more rows.",
         "Delete handles you no longer need.", retryable=True),
    Code("worker_lost", "Overloaded", "The process that runs the model ended; it is started again.",
         "Send the request again in a few seconds.", retryable=True),
    Code("quarantined", "RunFailed", "The process that runs the model ended each time it ran this request.",
         "Change the request, or send its id to the operator; an hour later it is tried again."),
    Code("bad_result", "ServerFault", "The worker's result is not what was declared; nothing of it left.",
         "Send the request id to the operator."),
    Code("internal", "ServerFault", "A fault of ours.", "Send the request id to the operator."),
    Code("ledger_unavailable", "ServerFault", "The ledger cannot be written, so nothing may leave.",
         "Send the request id to the operator.", retryable=True),
    Code("ledger_rolled_back", "ServerFault", "The ledger is not the one that was anchored, or an older copy of it.",
         "Restore the newest copy; `trocar audit verify` says what is missing."),
    Code("store_damaged", "ServerFault", "A stored file is not the one that was written.",
         "Send the request id to the operator, who runs `trocar doctor`."),
    Code("bad_bits", "ServerFault", "An amount of bits that the ledger does not accept.",
         "Send the request id to the operator."),
    Code("reservation_closed", "ServerFault", "A reservation that was already settled, cancelled or recovered.",
         "Send the request id to the operator."),
    # models on disk
    Code("model_not_pulled", "NotFound", "The model is not in the cache.", "Run `trocar model pull NAME`."),
    Code("pull_failed", "RunFailed", "The model could not be obtained or converted.",
         "Check the network, then run `trocar model pull` again."),
    Code("checksum_mismatch", "RunFailed", "The downloaded file is not the one we know.",
         "Delete it and pull again; if it persists, report it."),
    Code("model_unsupported", "RunFailed", "The architecture has no site adapter, or failed its own validation.",
         "See docs/models.md for the families served."),
    # the SDK
    Code("unreachable", "ClientError", "No server answers.",
         "Start one with `trocar serve`, or set TROCAR_URL.", retryable=True),
    Code("bad_argument", "ClientError", "An argument that the SDK does not understand.",
         "See the reason for what is accepted."),
    Code("not_here", "ClientError", "A value that lives on the server and cannot be used as a local array.",
         "Reduce it on the server (lens, score, fit) or capture it as a handle."),
    # the command line
    Code("unknown_command", "ClientError", "A command that does not exist.", "`trocar --help` lists the commands."),
    Code("missing_extra", "ClientError", "A package that this part of Trocar needs is not installed.",
         "Run `pip install 'trocar[server]'`."),
    Code("no_ledger", "NotFound", "The data folder holds no ledger.",
         "Start `trocar serve` once, or name the right folder with --data."),
    Code("data_unwritable", "ClientError", "The data folder cannot be written.",
         "Name a folder of your own with --data or TROCAR_DATA."),
    Code("start_failed", "RunFailed", "A process of the server did not come up.",
         "Read what the process said: the worker in worker.log, the others here."),
    Code("network_open", "RunFailed", "A worker that cannot leave the machine's network.",
         "Start it where there is no network (a container without one, systemd's PrivateNetwork=yes, unshare --net), "
         "or add --network allowed."),
    Code("cannot_listen", "ClientError", "The address is taken or is not one of this machine's.",
         "Choose another --port; 0 picks a free one."),
)
# fmt: on
CODES: Final[dict[str, Code]] = {row.name: row for row in TABLE}
