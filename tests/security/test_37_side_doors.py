"""Row 37: no route but those that watch a server is open without a key, by whatever method or spelling."""

from __future__ import annotations

import itertools
import re

import httpx

from tests.security.conftest import KEY, Attacked
from weft.front.app import Routes
from weft.front.guard import OPEN_PATHS

TABLE = Routes(None, 1, 1, 1).table()  # type: ignore[arg-type]
PATHS = sorted({re.sub(r"\{\w+(:\w+)?\}", "x", route.path) for route in TABLE})
DOORS = [
    "/invocations",
    "/pooling",
    "/score",
    "/pause",
    "/scale_elastic_ep",
    "/terminate",
    "/v1/rerank",
    "/docs",
    "/server_info",
]


def test_every_route_asks_for_a_key(server: Attacked) -> None:
    assert len(PATHS) > 20
    with server.attacked(), httpx.Client(base_url=server.url, timeout=60) as stranger:
        for path in PATHS:
            for method in ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"):
                for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": KEY}):
                    status = stranger.request(method, path, headers=headers).status_code
                    assert (status == 401) is (path not in OPEN_PATHS), (method, path, headers, status)


def test_doors_of_other_engines_are_not_there(server: Attacked) -> None:
    with server.attacked():
        for path, method in itertools.product(DOORS, ("GET", "POST")):
            assert server.http.request(method, path).status_code == 404
            assert httpx.request(method, server.url + path).status_code == 401


def test_spellings_of_open_paths_open_nothing(server: Attacked) -> None:
    with server.attacked(), httpx.Client(base_url=server.url, timeout=60) as stranger:
        for path in (
            "//v1/files",
            "/health/../v1/files",
            "/v1/files/",
            "/V1/FILES",
            "/health%2f..%2fv1%2ffiles",
            "/v1//files",
        ):
            assert stranger.get(path).status_code in (401, 404), path
            assert "data" not in stranger.get(path).text
