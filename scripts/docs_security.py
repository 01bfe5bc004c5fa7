"""The tables of `docs/security.md`, from the table of ops and the default policy: what leaves at which price."""

from __future__ import annotations

from trocar.gate import policy_file
from trocar.gate.policy import Lineage, Policy, Tier
from trocar.graph.cost import Prices, token_bits
from trocar.graph.facts import ModelFacts
from trocar.graph.spec import SPEC


def disclosure_table(large: ModelFacts) -> str:
    """What each output op tells, and what it costs, from the table of ops and the default policy."""
    tiers = {t: Policy().prices(t) for t in Tier}
    rows = [
        "| op | leaves as | charged | " + " | ".join(f"`{t.value}`" for t in tiers) + " |",
        "|---" * (3 + len(tiers)) + "|",
    ]
    for row in SPEC.values():
        if row.group == "output":
            cells = " | ".join(_unit_price(row.op, prices, large) for prices in tiers.values())
            rows.append(f"| `{row.op}` | {row.declassifier} | {row.unit} | {cells} |")
    return "\n".join(rows) + "\n"


def _unit_price(op: str, prices: Prices, large: ModelFacts) -> str:
    """Bits of one unit."""
    number, token, width = prices.scalar_bits, token_bits(large), large.d_model
    if op == "raw" and prices.rules.raw != "direct":
        return f"{prices.rules.raw} only"
    bits = {
        "capture": 0,
        "lens": token + number,
        "text": token,
        "raw": width * prices.vector_bits + prices.row_scale_bits,
    }.get(op, number)
    return f"{bits} bits" if bits else "0"


def tiers_table() -> str:
    """The default policy by tier."""
    rows = [
        "| tier | for life | on a day | a number | a number of a row | rows | directions of one site | answers leave |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tier in Tier:
        t = Policy().terms(tier)
        rows.append(
            f"| `{tier.value}` | {_percent(t.life_ppm)} | {_percent(t.day_ppm)} | {t.scalar_bits} bits | "
            f"{t.vector_bits} bits | {t.raw} | {_percent(t.rank_ppm)} | "
            f"{f'at multiples of {t.tick_ms} ms' if t.tick_ms else 'at once'} |"
        )
    return "\n".join(rows) + "\n"


def _percent(ppm: int | None) -> str:
    return "not limited" if ppm is None else f"{ppm / 10_000:g} %"


def budget_table(large: ModelFacts) -> str:
    """What 0.1 % of three sizes of weights buys at the prices of an external key."""
    prices, token = Policy().prices(Tier.external), token_bits(large)
    study = prices.overhead_bits * 20 + 10_000 * prices.scalar_bits + 8 * large.d_model
    grid = prices.overhead_bits + 80 * 100 * prices.scalar_bits
    samples = 500 * (prices.overhead_bits + 201 * token)
    bought = (
        ("single scores", prices.scalar_bits),
        ("token ids", token),
        ("probe studies: 10,000 scores and the probe at 8 bits", study),
        ("patching grids of 80 layers by 100 positions", grid),
        ("steering evaluations of 500 texts of 200 tokens", samples),
        ("raw rows of width 4,096 at 8 bits, through the airlock", large.d_model * 8 + 16),
    )
    rows = [
        "| one of these | bits | 8B ("
        + _bytes(8)
        + ") | 70B ("
        + _bytes(70)
        + ") | 405B ("
        + _bytes(405)
        + ") |",
        "|---|---|---|---|---|",
    ]
    for name, bits in bought:
        counts = " | ".join(f"{_budget(billions) // bits:,}" for billions in (8, 70, 405))
        rows.append(f"| {name} | {bits:,} | {counts} |")
    return "\n".join(rows) + "\n"


def _budget(billions: int) -> int:
    lineage = Lineage("x", billions * 10**9 * 16, Tier.external)
    return Policy().limits(Tier.external, lineage).life_bits or 0


def _bytes(billions: int) -> str:
    return f"{_budget(billions) / 8e6:.0f} MB"


def policy_table() -> str:
    """Every setting of the default policy with its meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for path, value in policy_file.settings(Policy()):
        if not path.startswith("people.tiers."):
            rows.append(f"| `{path}` | {value} | {policy_file.meaning(path)} |")
    return "\n".join(rows) + "\n"


def texts(large: ModelFacts) -> dict[str, str]:
    """The generated parts of the page, by name.

    Args:
        large: the model that prices are told for.
    """
    return {
        "disclosure": disclosure_table(large),
        "tiers": tiers_table(),
        "budgets": budget_table(large),
        "policy": policy_table(),
    }
