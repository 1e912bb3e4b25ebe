"""Row 14: no request says how a server is laid out: ranks, sizes, addresses of other engines, devices."""

from __future__ import annotations

from typing import Any

import pytest

from tests.security.conftest import Attacked, is_refused

TRANSFER = {
    "tp_size": 10**9,
    "remote_engine_id": "x",
    "remote_host": "127.0.0.1",
    "remote_port": 1,
    "remote_block_ids": [0],
}
PARTS = [
    "place=distserve",
    "route=round_robin",
    "cost=roofline",
    "kv.offload=file(path='/tmp/weft-was-here')",
    "nothing=at_all",
]
SAY = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@pytest.mark.parametrize("value", [TRANSFER, [TRANSFER], {"tp_size": -1}, "x"], ids=range(4))
def test_transfers_are_refused(server: Attacked, value: Any) -> None:
    with server.attacked():
        for path, body in (
            ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
            ("/v1/chat/completions", SAY),
            ("/v1/messages", SAY),
            ("/v1/responses", {"input": "a"}),
        ):
            is_refused(server.post(path, {**body, "kv_transfer_params": value}))
            is_refused(server.post(path, {**body, "vllm_xargs": {"kv_transfer_params": value}}))


def test_a_stack_of_ones_own_lays_out_nothing(server: Attacked) -> None:
    with server.attacked():
        for part in PARTS:
            body = {"prompt": "a", "max_tokens": 1, "weft": {"with": [part]}}
            is_refused(server.post("/v1/completions", body))
