"""Row 38: no key hits what another has cached, so there is nothing to time; blocks' names are 256 bits of a hash."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import ADMIN, KEY, OTHER, Attacked, is_refused
from weft.core import prefix

PROMPT = [300 + i for i in range(200)]


def cached(server: Attacked, key: str, **more: Any) -> int:
    """Tokens of the prompt that came from the cache, for the holder of this key."""
    body = {"prompt": PROMPT, "max_tokens": 1, **more}
    answer = server.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_no_hit_across_keys(server: Attacked) -> None:
    with server.attacked():
        assert cached(server, KEY) == 0
        own = cached(server, KEY)
        assert own >= 128, "one's own are hit"
        assert cached(server, OTHER) == 0
        assert cached(server, ADMIN) == 0
        assert cached(server, OTHER) == own


def test_no_salt_makes_one_the_other(server: Attacked) -> None:
    """A salt stands below its key: none that a client writes is another client's, or another client's without salt."""
    cached(server, OTHER, cache_salt="x")
    with server.attacked():
        for salt in ("x", "other\0x", "other", "\0", "\0x", "other\0"):
            assert cached(server, KEY, cache_salt=salt) == 0, salt
        is_refused(server.post("/v1/completions", {"prompt": "a", "cache_salt": "x" * 300}))


def test_names_are_256_bits_and_depend_on_all(server: Attacked) -> None:
    roots = {
        prefix.root(salt, settings) for salt in (b"", b"a", b"ab", b"a\0") for settings in (b"", b"b", b"\0b", b"c")
    }
    assert len(roots) == 16, "where a salt ends and settings begin is part of the hash"
    assert {len(root) for root in roots} == {32}
