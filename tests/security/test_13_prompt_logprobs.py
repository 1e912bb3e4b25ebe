"""Row 13: log-probabilities of a whole prompt: prompt times alternatives is bounded, and a sentinel means nothing."""

from __future__ import annotations

from tests.security.conftest import Attacked, is_refused
from weft.sampling import MAX_LOGPROBS


def test_sentinels_and_whole_vocabularies_are_refused(server: Attacked) -> None:
    with server.attacked():
        for count in (-1, 0, 1, 20, 4096, 155_000, 1 << 31):
            body = {"prompt": "a", "max_tokens": 1, "prompt_logprobs": count}
            is_refused(server.post("/v1/completions", body))
            is_refused(server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **body}))
        for count in (-1, MAX_LOGPROBS + 1, 4096, 155_000):
            is_refused(
                server.post("/v1/completions", {"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": count})
            )


def test_the_most_that_is_given_fits(server: Attacked) -> None:
    """The longest prompt with the most alternatives, several times: bounded as attacks are."""
    context = server.post("/tokenize", {"prompt": "a"}).json()["max_model_len"]
    body = {"prompt": [500] * (context - 1), "max_tokens": 0, "echo": True, "logprobs": MAX_LOGPROBS}
    server.post("/v1/completions", body)  # what any long prompt costs once is not this row's business
    with server.attacked():
        for _ in range(3):
            answer = server.post("/v1/completions", body)
            assert answer.status_code == 200
            assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == context - 1
