"""Tokens: offline narrowing allows what all links allow, and nothing that was not signed or is not ours is read."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import biscuit_auth
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grant_words import scopes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_forge import bodies, chain, field, fields, raw_of, rewritten, text, whole

import trocar
from trocar.errors import AuthError, ClientError, ProgramError, TrocarError
from trocar.grants import biscuits, tokens
from trocar.grants.biscuits import Root
from trocar.grants.envelope import MAX_BLOCKS
from trocar.grants.scope import EVERYTHING, MAX_WORDS, Scope
from trocar.grants.tokens import MAX_TEXT, attenuate, ids, sign, verify

ROOT = Root.make()
KEY = "0123456789abcdef"
FULL = Scope(
    models=frozenset({"toy", "lab/m:1"}), ops=frozenset({"edit", "lens"}), sites=frozenset({"z.1", "resid_post"}),
    most_bits=2**62, expires_ms=1,
)  # fmt: skip
links = st.lists(st.tuples(scopes, st.sampled_from([None, "agent"])), max_size=6)


def refused(token: str) -> dict[str, Any]:
    with pytest.raises(AuthError) as e:
        verify(token, ROOT.public)
    return e.value.as_json()


UNKNOWN = refused("trt_")


def with_block(source: str) -> str:
    """A well signed token whose second block has any Datalog at all."""
    first = raw_of(sign(ROOT, KEY))
    public = biscuit_auth.PublicKey.from_bytes(ROOT.public, biscuit_auth.Algorithm.Ed25519)
    grown = biscuit_auth.Biscuit.from_bytes(first, public).append(biscuit_auth.BlockBuilder(source))
    return text(ROOT.public, bytes(grown.to_bytes()))


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(scopes, links)
def test_a_chain_allows_what_every_link_allows(first: Scope, rest: list[tuple[Scope, Any]]) -> None:
    token = sign(ROOT, KEY, first)
    seen = verify(token, ROOT.public)
    for scope, role in rest:
        token = attenuate(token, scope, role)
        grant = verify(token, ROOT.public)
        assert grant.scope.within(seen.scope)
        assert grant.scope.within(scope)
        assert grant.links[: len(seen.links)] == seen.links
        seen = grant
    said = [first, *(scope for scope, _ in rest)]
    assert (seen.key_id, [link.scope for link in seen.links]) == (KEY, said)
    assert seen.scope == functools.reduce(Scope.narrower, said)
    assert seen.agent == any(role for _, role in rest)
    assert len(set(ids(token))) == len(said)
    assert ids(token) == tuple(link.id for link in seen.links)


def test_every_part_survives_the_text() -> None:
    [link] = verify(sign(ROOT, KEY, FULL, agent=True), ROOT.public).links
    assert (link.scope, link.agent) == (FULL, True)


def test_a_block_without_words_can_be_revoked_alone() -> None:
    token = sign(ROOT, KEY)
    one, other = attenuate(token, EVERYTHING), attenuate(token, EVERYTHING)
    assert verify(one, ROOT.public).scope == EVERYTHING
    assert ids(one)[0] == ids(other)[0] == ids(token)[0]
    assert ids(one)[1] != ids(other)[1]


def test_a_block_cannot_be_taken_off_moved_or_swapped() -> None:
    two = attenuate(attenuate(sign(ROOT, KEY), Scope(most_bits=5)), Scope(most_bits=3), "agent")
    parts = list(fields(raw_of(two)))
    first, one, other, proof = (field(number, payload) for number, payload in parts)
    foreign = dict(fields(raw_of(attenuate(sign(ROOT, KEY), Scope(most_bits=9)))))[3]
    assert verify(text(ROOT.public, first + one + other + proof), ROOT.public).scope.most_bits == 3
    for made in (
        first + proof,
        first + one + proof,
        first + other + proof,
        first + other + one + proof,
        first + one + one + other + proof,
        first + one + field(3, foreign) + proof,
        first + one + other,
        one + other + proof,
        field(2, parts[1][1]) + other + proof,
    ):
        assert refused(text(ROOT.public, made)) == UNKNOWN


def test_another_root_signs_for_itself_only() -> None:
    stranger = Root.make()
    token = sign(stranger, KEY)
    assert verify(token, stranger.public).key_id == KEY
    assert refused(token) == UNKNOWN
    assert refused(text(ROOT.public, raw_of(token))) == UNKNOWN
    assert refused(text(stranger.public, raw_of(sign(ROOT, KEY)))) == UNKNOWN


@settings(max_examples=400)
@given(st.data())
def test_no_bit_of_a_token_may_change(data: st.DataObject) -> None:
    raw = bytearray(raw_of(attenuate(sign(ROOT, KEY, Scope(most_bits=5)), FULL)))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert refused(text(ROOT.public, bytes(raw))) == UNKNOWN


def test_no_part_of_a_token_is_a_token() -> None:
    token = attenuate(sign(ROOT, KEY), Scope(most_bits=5))
    for cut in range(len(token)):
        assert refused(token[:cut]) == UNKNOWN
    raw = raw_of(token)
    for made in (raw + b"\0", b"\0" + raw, raw + raw, raw + field(4, raw[-34:]), b"", bytes(2000)):
        assert refused(text(ROOT.public, made)) == UNKNOWN


@pytest.mark.parametrize("change", ["", "trt_", "x", " ", "\n", "=", "é", "\x00", "\ud800"])
def test_a_text_has_one_spelling(change: str) -> None:
    token = sign(ROOT, KEY)
    for made in (change, token + (change or "A"), (change or "A") + token, token[:9] + change + token[10:]):
        assert refused(made) == UNKNOWN


def test_the_last_letter_has_no_spare_bits() -> None:
    token = next(
        t for t in (sign(ROOT, KEY, Scope(most_bits=b)) for b in (1, 2**8, 2**16, 2**30)) if len(t) % 4
    )
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    good = [c for c in alphabet if _is_good(token[:-1] + c)]
    assert good == [token[-1]]


def _is_good(token: str) -> bool:
    try:
        verify(token, ROOT.public)
    except AuthError:
        return False
    return True


def test_a_megabyte_is_refused_before_it_is_decoded() -> None:
    assert refused("trt_" + "A" * 10**6) == UNKNOWN
    assert refused(sign(ROOT, KEY) + "A" * MAX_TEXT) == UNKNOWN


def test_a_signature_has_one_spelling() -> None:
    """Otherwise a block would have two ids: revoked under one, and with a fresh account under the other."""
    raw = raw_of(attenuate(sign(ROOT, KEY), Scope(most_bits=5)))
    made = rewritten(raw)
    assert (len(made), made != raw) == (len(raw), True)
    assert refused(text(ROOT.public, made)) == UNKNOWN


def test_what_is_forged_by_hand_would_be_read() -> None:
    """The forge makes good tokens; so what it is refused below is refused for the one thing that is wrong."""
    good = bodies(raw_of(attenuate(sign(ROOT, KEY), FULL)))
    grant = verify(text(ROOT.public, chain(ROOT.secret, good)), ROOT.public)
    assert (grant.key_id, grant.scope) == (KEY, FULL)


@pytest.mark.parametrize(
    "odd",
    [
        {"before": whole(1, 0)},
        {"before": whole(1, 7)},
        {"extra": whole(5, 0)},
        {"extra": whole(5, 1)},
        {"extra": field(4, field(1, bytes(64)) + field(2, whole(1, 0) + field(2, bytes(32))))},
        {"extra": field(9, b"x")},
        {"proof": field(2, bytes(64))},
        {"proof": field(1, bytes(31))},
        {"proof": field(1, bytes(32)) + field(1, bytes(32))},
        {"proof": b"\x0a"},
    ],
)
def test_other_shapes_of_a_biscuit_are_refused(odd: dict[str, bytes]) -> None:
    good = bodies(raw_of(attenuate(sign(ROOT, KEY), FULL)))
    assert refused(text(ROOT.public, chain(ROOT.secret, good, **odd))) == UNKNOWN


@pytest.mark.parametrize(
    "unseen",
    [field(2, b"a context"), field(7, whole(1, 1)), field(8, whole(1, 0) + field(2, bytes(32))), b"\x00"],
)
def test_what_does_not_show_in_the_text_ends_the_token(unseen: bytes) -> None:
    first, second = bodies(raw_of(attenuate(sign(ROOT, KEY), FULL)))
    for made in ([first + unseen], [first, second + unseen], [unseen + first]):
        assert refused(text(ROOT.public, chain(ROOT.secret, made))) == UNKNOWN


def test_another_algorithm_is_refused() -> None:
    """ECDSA signatures can be rewritten by whoever sees them, and algorithms that do not exist sign nothing."""
    raw = raw_of(attenuate(sign(ROOT, KEY), FULL))
    ed25519 = whole(1, 0) + b"\x12\x20"
    for algorithm in (1, 2, 127):
        other = whole(1, algorithm) + b"\x12\x20"
        assert raw.count(ed25519) == 2
        assert refused(text(ROOT.public, raw.replace(ed25519, other))) == UNKNOWN
        assert refused(text(ROOT.public, raw.replace(ed25519, other, 1))) == UNKNOWN


def test_a_next_key_of_ecdsa_is_refused_although_the_chain_is_well_signed() -> None:
    following = bytes.fromhex(
        "036b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    )  # of the secret 1
    body = bodies(raw_of(sign(ROOT, KEY)))[0]
    signature = Ed25519PrivateKey.from_private_bytes(ROOT.secret).sign(
        body + (1).to_bytes(4, "little") + following
    )
    block = field(1, body) + field(2, whole(1, 1) + field(2, following)) + field(3, signature)
    raw = field(2, block) + field(4, field(1, (1).to_bytes(32, "big")))
    public = biscuit_auth.PublicKey.from_bytes(ROOT.public, biscuit_auth.Algorithm.Ed25519)
    assert biscuit_auth.Biscuit.from_bytes(raw, public).block_count() == 1  # the library takes it
    assert refused(text(ROOT.public, raw)) == UNKNOWN


@pytest.mark.parametrize(
    "source",
    [
        'key("0123456789abcdef")',
        'key("fedcba9876543210")',
        "bits(-1)",
        "bits(4611686018427387905)",
        'bits("5")',
        "bits(5, 6)",
        "bits(5); bits(6)",
        'role("owner")',
        'role("operator")',
        'role("agent"); role("researcher")',
        "role(true)",
        'right("mint")',
        "check if true",
        "check if bits(5)",
        "reject if bits(5)",
        "check all now_ms($now), $now < 5",
        "check if now_ms($now), $now > 5",
        "check if now_ms($now), $now < 5 or true",
        "check if now_ms($now), $now < 5 trusting previous",
        "check if now_ms($now), $now < 2030-01-01T00:00:00Z",
        "check if now_ms($now), $now < 5; check if now_ms($now), $now < 6",
        'check if model($word), {"toy"}.contains($word)',
        'check all model($word), {"toy"}.contains($word) or true',
        'check all model($word), !{"toy"}.contains($word)',
        'check all model($word), ["toy"].contains($word)',
        "check all model($word), {3}.contains($word)",
        'check all model($word), {"to y"}.contains($word)',
        'check all tier($word), {"toy"}.contains($word)',
        'check all op($word), {"nothing"}.contains($word)',
        'check all site($word), {"nowhere.3"}.contains($word)',
        'check all site($word), {"resid_post.x"}.contains($word)',
        "bits($n) <- bits($n)",
        'bits($n) <- other($n), $n.starts_with("x")',
        'note("a\nbits(5);")',
        'note("x"); bits(5)',
    ],
)
def test_a_block_with_any_other_statement_ends_the_token(source: str) -> None:
    assert refused(with_block(source)) == UNKNOWN


def test_what_the_last_test_appends_is_read_when_it_is_ours() -> None:
    source = 'role("agent"); bits(5); check all op($word), {"lens"}.contains($word); check if now_ms($now), $now < 7'
    grant = verify(with_block(source), ROOT.public)
    assert (grant.scope, grant.agent) == (Scope(ops=frozenset({"lens"}), most_bits=5, expires_ms=7), True)


def test_a_part_with_too_many_words_ends_the_token() -> None:
    def words(count: int) -> str:
        listed = ", ".join(f'"m{i}"' for i in range(count))
        return f"check all model($word), {{{listed}}}.contains($word)"

    assert len(verify(with_block(words(MAX_WORDS)), ROOT.public).scope.models or ()) == MAX_WORDS
    assert refused(with_block(words(MAX_WORDS + 1))) == UNKNOWN


def test_a_first_block_names_a_key() -> None:
    nameless = text(ROOT.public, biscuits.sign(ROOT, "bits(5);"))
    assert refused(nameless) == UNKNOWN
    assert refused(text(ROOT.public, biscuits.sign(ROOT, 'key("0123456789ABCDEF");'))) == UNKNOWN
    assert refused(text(ROOT.public, chain(ROOT.secret, [b"\xff" * 9]))) == UNKNOWN


def test_a_later_language_is_refused() -> None:
    """The library checks the signature of such a block and notices when it prints it."""
    first, second = bodies(raw_of(attenuate(sign(ROOT, KEY), Scope(most_bits=5))))
    assert second.count(whole(3, 3)) == 1
    later = second.replace(whole(3, 3), whole(3, 127))
    assert refused(text(ROOT.public, chain(ROOT.secret, [first, later]))) == UNKNOWN


def test_chains_have_an_end() -> None:
    token = sign(ROOT, KEY)
    for _ in range(MAX_BLOCKS - 1):
        token = attenuate(token, EVERYTHING)
    assert len(verify(token, ROOT.public).links) == MAX_BLOCKS
    with pytest.raises(ClientError, match="the most there can be"):
        attenuate(token, EVERYTHING)
    longer = biscuits.append(raw_of(token), ROOT.public, "")
    assert refused(text(ROOT.public, longer)) == UNKNOWN


def test_a_token_that_no_server_would_read_is_not_made() -> None:
    wide = Scope(models=frozenset(f"{'m' * 190}{i}" for i in range(MAX_WORDS)))
    with pytest.raises(ClientError, match="characters"):
        attenuate(sign(ROOT, KEY), wide)


@pytest.mark.parametrize("token", ["", "trk_x", "trt_", "trt_" + "A" * 60, sign(ROOT, KEY)[:-2]])
def test_a_text_that_is_no_token_is_named_to_its_holder(token: str) -> None:
    for act in (lambda: attenuate(token, EVERYTHING), lambda: ids(token)):
        with pytest.raises(ClientError) as e:
            act()
        assert (e.value.code, e.value.path) == ("bad_argument", "token")
        assert len(token) < 9 or token[4:] not in str(e.value)


@pytest.mark.parametrize("role", ["owner", "researcher", "", "Agent"])
def test_a_token_is_given_no_other_role(role: Any) -> None:
    with pytest.raises(ProgramError) as e:
        attenuate(sign(ROOT, KEY), EVERYTHING, role)
    assert (e.value.code, e.value.path) == ("bad_value", "role")


def test_an_empty_part_is_not_written() -> None:
    for act in (
        lambda: attenuate(sign(ROOT, KEY), Scope(ops=frozenset())),
        lambda: sign(ROOT, KEY, Scope(ops=frozenset())),
    ):
        with pytest.raises(ProgramError) as e:
            act()
        assert e.value.path == "ops"


def test_a_secret_of_another_size_is_broken() -> None:
    with pytest.raises(biscuits.Broken):
        Root.of(b"short")


def test_without_the_library_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    token = sign(ROOT, KEY)
    monkeypatch.delattr(trocar.grants, "biscuits")
    monkeypatch.setitem(sys.modules, "trocar.grants.biscuits", None)
    for act in (lambda: attenuate(token, EVERYTHING), lambda: ids(token)):
        with pytest.raises(TrocarError) as e:
            act()
        assert e.value.code == "missing_extra"
        assert "trocar[tokens]" in e.value.next_step


def test_narrowing_needs_nothing_of_a_server() -> None:
    code = (
        "import sys; from trocar.grants.tokens import attenuate; from trocar.grants.scope import Scope;"
        f" attenuate({sign(ROOT, KEY)!r}, Scope(most_bits=3), 'agent');"
        " print({'sqlalchemy', 'torch', 'fastapi', 'trocar.gate', 'trocar.client'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(trocar.__file__).parents[1])},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"


def test_the_secret_of_a_gate_is_not_in_its_tokens() -> None:
    token = attenuate(sign(ROOT, KEY, FULL), FULL)
    assert ROOT.secret not in raw_of(token)
    assert ROOT.public not in raw_of(token)
    assert len(token) < tokens.MAX_TEXT
