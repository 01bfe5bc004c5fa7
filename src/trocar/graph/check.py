"""The checker: a program and its scope in, `Checked` or every refusal out. Pure; milliseconds; no torch.

It walks the nodes once in list order. A node whose operand was refused is skipped, so that one mistake gives
one refusal. What it returns is all that the engine may use: resolved rows, token ids, values, the cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trocar import errors
from trocar.graph import cost, ops, rules_depth, rules_raw
from trocar.graph.cost import Cost, Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope, Selection, Walk
from trocar.graph.shapes import Value
from trocar.graph.spec import EDITS, OUTPUTS, SPEC, Lane

MAX_PROMPTS: Final = 4096
MAX_TOKENS: Final = 1_000_000
MAX_FLOPS: Final = 10**16
MAX_NODE_PROMPTS: Final = 1_000_000
MAX_REFUSALS: Final = 20
MAX_HELD_BYTES: Final = 1 << 30
MAX_REFERENCES: Final = 100_000


@dataclass(frozen=True, slots=True)
class Checked:
    """An accepted program with everything resolved.

    Attributes:
        values: type of each value node.
        selections: resolved rows by selector text.
        token_ids: ids asked for by each `logprobs` and `metric` node, per prompt.
        reads_gen: whether rows of generated tokens are read, so that the last token is fed back too.
        held_bytes: what the values of each prompt take while it runs, at float32.
        columns: column indices at the site, of each read or edit with heads or neurons, in the order given; not
            for attn_probs.
        scales: mean row norm of the site, of each edit that counts in it.
        stored: of each `stored` node, per prompt of this request: the stored prompt, and the rows within it.
        whole: whether a prompt must be processed in one piece, because a value flows from one row to another.
        depth: how many layers are computed.
        needs_final: whether rows after the final norm are wanted.
        last_depth: the same two for the last token of a text, whose row is read and nothing sampled from it: one more
            than all layers when it is wanted after the final norm.
        patterns: whether a node stands at attn_probs.
    """

    program: Program
    lengths: tuple[int, ...]
    generation: Generation
    values: Mapping[str, Value]
    selections: Mapping[str, Selection]
    token_ids: Mapping[str, tuple[tuple[int, ...], ...]]
    cost: Cost
    reads_gen: bool
    held_bytes: tuple[int, ...]
    columns: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float]
    stored: Mapping[str, tuple[tuple[int, tuple[int, ...]], ...]]
    whole: bool
    depth: int
    needs_final: bool
    last_depth: int
    patterns: bool

    @property
    def lane(self) -> Lane:
        """Where it runs: the shared batch, or the same with attention patterns written out."""
        return "A*" if self.patterns else "A"

    def edits(self) -> Iterator[ops.EditNode]:
        for node in self.program.nodes:
            if isinstance(node, ops.EDIT_NODES):
                yield node

    def outputs(self) -> Iterator[ops.OutputNode]:
        for node in self.program.nodes:
            if isinstance(node, ops.OUTPUT_NODES):
                yield node


def check(program: Program, scope: Scope, prices: Prices) -> Checked:
    """Accepts or refuses a program.

    Raises:
        ProgramError: with the first `MAX_REFUSALS` refusals found, each with a JSON path into the request.
        PolicyRefusal: the same, when only rules for rows are broken.
    """
    _check_prompts(scope)
    _check_size(program, scope)
    walk, found = Walk(scope, _reads_gen(program, scope)), list[errors.Refusal]()
    refused: set[str] = set()
    seen: set[str] = set()
    for i, node in enumerate(program.nodes):
        if len(found) >= MAX_REFUSALS:
            break
        path = f"program.nodes[{i}]"
        if node.id in seen or node.id in ops.RESERVED:
            taken = "has a meaning of its own" if node.id in ops.RESERVED else "is taken"
            found.append(errors.refusal("duplicate_id", f"{path}.id", f"the id {node.id!r} {taken}"))
            continue
        seen.add(node.id)
        _step(node, walk, path, found, refused)
    found.extend(rules_depth.beyond_stop(program, walk, refused))
    found.extend(rules_raw.refusals(program, walk, prices.rules, refused))
    if not any(n.op in OUTPUTS for n in program.nodes):
        found.append(errors.refusal("nothing_returned", "program.nodes", "the program has no output node"))
    if found:
        raise failed(found)
    return _accept(program, walk, prices)


def failed(found: Sequence[errors.Refusal]) -> errors.TrocarError:
    """A program's refusals as one exception: of policy when nothing else is wrong with the program."""
    policy = all(errors.kind_of(r.code) is errors.PolicyRefusal for r in found)
    return (errors.PolicyRefusal if policy else errors.ProgramError)(found[:MAX_REFUSALS])


def _check_prompts(scope: Scope) -> None:
    if not scope.lengths:
        raise errors.refuse("empty_prompt", "prompts", "the request has no prompt")
    if len(scope.lengths) > MAX_PROMPTS:
        raise errors.refuse(
            "too_expensive",
            "prompts",
            f"{len(scope.lengths)} prompts; one request takes at most {MAX_PROMPTS}",
        )
    if sum(scope.lengths) > MAX_TOKENS:
        raise errors.refuse(
            "too_expensive", "prompts", f"{sum(scope.lengths)} tokens; one request takes at most {MAX_TOKENS}"
        )
    room = max(0, scope.model.context - scope.generation.max_new_tokens)
    for i, length in enumerate(scope.lengths):
        if length == 0:
            raise errors.refuse("empty_prompt", f"prompts[{i}]", f"prompt {i} has no tokens")
        if length > room:
            raise errors.refuse(
                "prompt_too_long",
                f"prompts[{i}]",
                f"prompt {i} has {length} tokens; {room} fit with this generation",
            )


def _check_size(program: Program, scope: Scope) -> None:
    """Bounds the checker's own work before it starts."""
    references = sum(len(of) for n in program.nodes if isinstance(of := getattr(n, "of", None), tuple))
    if references > MAX_REFERENCES:
        raise errors.refuse(
            "too_many_nodes", "program.nodes",
            f"the outputs name {references} values; one program names at most {MAX_REFERENCES}",
        )  # fmt: skip
    size = len(program.nodes) * len(scope.lengths)
    if size > MAX_NODE_PROMPTS:
        raise errors.refuse(
            "too_expensive",
            "prompts",
            f"{len(program.nodes)} nodes on {len(scope.lengths)} prompts; the limit of their product is "
            f"{MAX_NODE_PROMPTS}",
        )


def _reads_gen(program: Program, scope: Scope) -> bool:
    """Whether a read or an output looks at generated tokens; selectors are spelled in two ways only."""
    looked = [n.at for n in program.nodes if n.op in ("read", "logprobs")]
    return scope.generation.max_new_tokens > 0 and any(at == "all" or at.startswith("gen") for at in looked)


def _step(node: ops.Node, walk: Walk, path: str, found: list[errors.Refusal], refused: set[str]) -> None:
    spec = SPEC[node.op]  # type: ignore[attr-defined]
    try:
        for name, kinds in spec.takes.items():
            if not _operands_known(node, name, kinds, walk, path, refused):
                refused.add(node.id)
                return
        value = spec.rule(node, walk, path)
    except errors.TrocarError as e:
        found.extend(e.refusals)
        refused.add(node.id)
        return
    if value is not None:
        walk.values[node.id] = value


def _operands_known(
    node: ops.Node, name: str, kinds: tuple[str, ...], walk: Walk, path: str, refused: set[str]
) -> bool:
    """False if an operand was refused before; raises if it never existed or is of a wrong kind."""
    given = getattr(node, name)
    for i, ref in enumerate(given if isinstance(given, tuple) else (given,)):
        where = f"{path}.{name}[{i}]" if isinstance(given, tuple) else f"{path}.{name}"
        if not isinstance(ref, str):  # a number, or nothing, where an operand may stand
            continue
        if ref in refused:
            return False
        if ref == ops.ZERO and isinstance(node, ops.EditSet) and name == "value":
            continue
        if ref == ops.ZERO:
            raise errors.refuse("wrong_operand", where, "'zero' is no value: only edit.set writes zeros")
        if ref not in walk.values:
            near = errors.closest(ref, walk.values)
            raise errors.refuse("unknown_ref", where, f"no earlier node has the id {ref!r}", closest=near)
        if walk.values[ref].kind not in kinds:
            raise errors.refuse(
                "wrong_operand", where, f"{ref!r} is {walk.values[ref].kind}; accepted: {', '.join(kinds)}"
            )
    return True


def _accept(program: Program, walk: Walk, prices: Prices) -> Checked:
    reach = rules_depth.reach(program, walk)
    price = _price(program, walk, reach.depth, prices)
    if price.tokens > MAX_TOKENS or price.flops > MAX_FLOPS:
        raise errors.refuse(
            "too_expensive",
            "prompts",
            f"{price.tokens} tokens and {price.flops:.1e} FLOPs; the limits are {MAX_TOKENS} and {MAX_FLOPS:.0e}",
        )
    held_bytes = _held_bytes(walk)
    if max(held_bytes) > MAX_HELD_BYTES:
        raise errors.refuse(
            "too_expensive",
            f"prompts[{held_bytes.index(max(held_bytes))}]",
            f"the values of one prompt take {max(held_bytes)} bytes while it runs; the limit is {MAX_HELD_BYTES}",
        )
    return Checked(
        program=program,
        lengths=walk.scope.lengths,
        generation=walk.scope.generation,
        values=walk.values,
        selections=walk.selections,
        token_ids=walk.token_ids,
        cost=price,
        reads_gen=walk.reads_gen,
        held_bytes=held_bytes,
        columns=walk.columns,
        scales=walk.scales,
        stored=walk.stored,
        whole=walk.whole,
        depth=reach.depth,
        needs_final=reach.final,
        last_depth=reach.last,
        patterns=reach.patterns,
    )


def _held_bytes(walk: Walk) -> tuple[int, ...]:
    """Bytes of every prompt's rows; a vector is shared and not counted."""
    totals = [0] * len(walk.scope.lengths)
    for value in walk.values.values():
        for i, rows in enumerate(value.counts):
            totals[i] += rows * value.width * cost.STORED_BYTES_PER_NUMBER
    return tuple(totals)


def _price(program: Program, walk: Walk, depth: int, prices: Prices) -> Cost:
    bits = {"overhead": prices.overhead_bits}
    edits = sum(1 for n in program.nodes if n.op in EDITS)
    if edits:
        bits["receipts"] = edits * cost.edit_bits(walk, prices)
    lengths = cost.lengths_bits(walk)
    if lengths:
        bits["lengths"] = lengths
    flops, stored = cost.pass_flops(walk, depth), 0
    for node in program.nodes:
        row = SPEC[node.op]
        if row.bits is not None:
            bits[node.id] = row.bits(node, walk, prices)
        if row.work is not None:
            flops += row.work(node, walk)
        if row.stored is not None:
            stored += row.stored(node, walk)
    reads = [walk.values[n.id] for n in program.nodes if n.op == "read"]
    return Cost(
        tokens=cost.tokens(walk),
        rows_read=sum(cost.rows_of(v, walk) for v in reads),
        flops=flops,
        bytes_stored=stored,
        bits_out=bits,
        total_bits=sum(bits.values()),
        download_bits=sum(cost.rows_of(v, walk) * v.width * 16 for v in reads),
    )
