"""/v1/embeddings beside transformers: hidden states of the bundled model, pooled over the last row and over all."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.front.conftest import MODEL, metric, serving
from tests.front.scripted import ScriptedPort
from weft.front.text import ModelText

TEXTS = ["Once upon a time there was a fox.", "The sea", "Tom and Sam went to the park to play with a big red ball."]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(bundled: Path, text: ModelText) -> Callable[[str | list[int], str], np.ndarray[Any, Any]]:
    """The same vectors by transformers: final hidden states, pooled, of length 1."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(bundled, dtype=torch.float32).eval()

    def vector(prompt: str | list[int], pooling: str) -> np.ndarray[Any, Any]:
        ids = text.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        with torch.inference_mode():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        pooled = states[-1] if pooling == "last" else states.double().mean(0).float()
        return (pooled / pooled.norm()).numpy()

    return vector


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_transformers(
    client: openai.OpenAI, reference: Callable[..., np.ndarray[Any, Any]], pooling: str
) -> None:
    made = client.embeddings.create(model=MODEL, input=TEXTS, extra_body={"pooling": pooling}, encoding_format="float")
    assert [one.index for one in made.data] == [0, 1, 2]
    for one, prompt in zip(made.data, TEXTS, strict=True):
        assert np.abs(np.array(one.embedding) - reference(prompt, pooling)).max() < TOLERANCE


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_long_prompt_in_chunks_and_again_from_the_cache(
    http: httpx.Client, reference: Callable[..., np.ndarray[Any, Any]], pooling: str
) -> None:
    """More tokens than a step has rows; the second time "last" takes its prefix from the index, and "mean" must not."""
    ids = [100 + (7 * i) % 900 for i in range(700)]
    body = {"model": MODEL, "input": ids, "pooling": pooling}
    first = http.post("/v1/embeddings", json=body).json()
    hits = metric(http, "weft:prefix_hit_tokens_total")
    again = http.post("/v1/embeddings", json=body).json()
    assert (metric(http, "weft:prefix_hit_tokens_total") > hits) is (pooling == "last")
    assert first["usage"] == {"prompt_tokens": 700, "total_tokens": 700}
    assert np.abs(np.array(first["data"][0]["embedding"]) - reference(ids, pooling)).max() < TOLERANCE
    assert again["data"] == first["data"]


def test_vectors_do_not_depend_on_company(http: httpx.Client, reference: Callable[..., np.ndarray[Any, Any]]) -> None:
    """More sequences than the pool holds at once, so that some are computed in pieces beside others, or anew."""
    prompts = [[200 + (k * 31 + i) % 1000 for i in range(60 + 13 * k)] for k in range(40)]
    made = http.post("/v1/embeddings", json={"model": MODEL, "input": prompts, "pooling": "mean"}).json()["data"]
    for k in (0, 17, 39):
        assert np.abs(np.array(made[k]["embedding"]) - reference(prompts[k], "mean")).max() < TOLERANCE


def test_formats_and_sizes(client: openai.OpenAI, http: httpx.Client) -> None:
    def ask(**fields: Any) -> Any:
        return http.post("/v1/embeddings", json={"model": MODEL, "input": "The sea", **fields}).json()["data"][0][
            "embedding"
        ]

    whole = ask()
    raw = base64.b64decode(ask(encoding_format="base64"))
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == whole
    assert abs(np.linalg.norm(whole) - 1) < 1e-6
    short = np.array(ask(dimensions=16))
    assert len(short) == 16
    assert np.abs(short - np.array(whole[:16]) / np.linalg.norm(whole[:16])).max() < 1e-6
    bare = np.array(ask(normalize=False))
    assert np.abs(bare / np.linalg.norm(bare) - whole).max() < 1e-6
    assert abs(np.linalg.norm(bare) - 1) > 0.1
    assert client.embeddings.create(model=MODEL, input="The sea").data[0].embedding == whole  # by base64


def test_forms_of_input_agree(http: httpx.Client, text: ModelText) -> None:
    ids = text.prompt_ids("The sea")
    found = [
        http.post("/v1/embeddings", json={"model": MODEL, "input": given}).json()["data"]
        for given in ("The sea", ["The sea"], ids, [ids])
    ]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [[1 << 30]]}, "prompt"),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 100_000}, "dimensions"),
        ({"pooling": "cls"}, "pooling"),
        ({"input": [5] * 2000}, "prompt"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_wrong_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": MODEL, "input": "The sea", **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_engine_without_states_is_a_clear_error(text: ModelText, scripted: Callable[..., ScriptedPort]) -> None:
    port = scripted(lambda spec, index: [65])
    with serving(port, text) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "The sea"})
    assert answer.status_code == 500
    assert "no hidden states" in answer.json()["error"]["message"]
