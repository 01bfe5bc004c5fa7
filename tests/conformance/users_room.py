"""Eight users with eight kinds of program, and the same eight places without any edit."""

from __future__ import annotations

import torch
from bench_room import Ask, Bench, greedy, handle, logprobs, read, text

from trocar.graph import ops, words

TOKENS = (1, 17, 42, 99)
V = ops.Tensor(id="v", name="v")


def eight(bench: Bench) -> list[Ask]:
    """Steering, ablation, patching, gating, clamping, a dictionary, cut edges, a low-rank edit; some generate."""
    m, p = bench.middle, bench.prompts
    post, later = f"resid_post.{m}", f"resid_post.{m + 1}"
    push, size = bench.pushing(post, 2.0), bench.usual(post)
    return [
        Ask(
            [V, ops.EditAdd(id="e", site=post, at="all", value="v"), text(), logprobs(TOKENS, "all")],
            [p[1], p[2]],
            greedy(3),
            vectors={"v": push},
            tenant="one",
        ),
        Ask(
            [ops.EditSet(id="e", site=f"attn_out.{m}", at="prompt[*]", value="zero"), logprobs(TOKENS)],
            [p[3]],
            tenant="two",
        ),
        Ask(
            [
                ops.Stored(id="s", handle=handle(), site=post),
                ops.EditSet(id="e", site=post, at="prompt[0:2]", value="s"),
                logprobs(TOKENS),
            ],
            [p[1]],
            stored={"s": [torch.stack([bench.pushing(post, 1.0, i) for i in range(2)])]},
            tenant="three",
        ),
        Ask(
            [
                V,
                read(post, "all"),
                ops.Dot(id="d", a="r", b="v"),
                ops.Gt(id="g", a="d", b=0.0),
                ops.EditProjectOut(id="e", site=post, value="v", gate="g"),
                text(),
                logprobs(TOKENS, "all"),
            ],
            [p[0], p[3]],
            greedy(5),
            vectors={"v": bench.pushing(post, 1.0, 7)},
            tenant="four",
        ),
        Ask(
            [
                V,
                ops.EditClamp(id="e", site=later, at="prompt[*]", value="v", low=size, high=2 * size),
                logprobs(TOKENS),
            ],
            [p[2], p[0]],
            vectors={"v": push},
            tenant="five",
        ),
        _dictionary(bench, post, [p[1]]),
        Ask(
            [
                ops.EditKnockout(id="e", site=f"attn_probs.{m}", at="prompt[1:]", keys="prompt[0]"),
                ops.EditScale(id="x", site="embeddings", at="all", by=1.5),
                text(),
                logprobs(TOKENS, "all"),
            ],
            [p[1], p[3]],
            greedy(4),
            tenant="seven",
        ),
        _low_rank(bench, post, later, [p[2], p[0]]),
    ]


def _dictionary(bench: Bench, site: str, prompts: list[tuple[int, ...]]) -> Ask:
    width, draw = bench.width(site), torch.Generator().manual_seed(9)
    enc = torch.randn(width, 16, generator=draw) / width**0.5
    arrays = {"w_enc": enc, "b_enc": torch.zeros(16), "w_dec": enc.T.clone(), "b_dec": torch.zeros(width)}
    sae = ops.Sae(id="sae", activation="topk", k=4, **{name: name for name in arrays})
    edit = ops.EditSae(
        id="e",
        site=site,
        sae="sae",
        at="prompt[*]",
        features=(words.Feature(index=2, set=9 * bench.usual(site)),),
    )
    return Ask([sae, edit, logprobs(TOKENS)], prompts, vectors=arrays, tenant="six")


def _low_rank(bench: Bench, site: str, later: str, prompts: list[tuple[int, ...]]) -> Ask:
    width, draw = bench.width(site), torch.Generator().manual_seed(11)
    arrays = {
        "down": torch.randn(width, 2, generator=draw) / width**0.5,
        "up": torch.randn(2, width, generator=draw),
    }
    nodes = [
        *[ops.Tensor(id=name, name=name) for name in arrays],
        ops.EditAffine(id="e", site=site, at="prompt[*]", down="down", up="up"),
        read(site),
        read(later, name="s"),
        ops.Sub(id="d", a="s", b="r"),
        ops.Mean(id="m", of="d"),
        ops.EditAdd(id="x", site=later, at="prompt[*]", value="m", coef=-2.0),
        logprobs(TOKENS),
    ]
    return Ask(nodes, prompts, vectors=arrays, tenant="eight")


def bare(ask: Ask) -> Ask:
    """The same prompts and lengths, and no edit."""
    tail = [n for n in ask.nodes if n.id in ("lp", "text")]
    return Ask(tail, ask.prompts, ask.generation, tenant=ask.tenant)
