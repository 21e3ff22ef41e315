"""The middleware refuses what would write into the log or take unplanned memory, and hands on all else untouched."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve.plugin.middleware import Honest
from serve.plugin.request_check import LARGEST_BODY, LARGEST_PROMPT, wrong_with

BAD = {"$ref": "x\nFORGED"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": 'What is "$ref"? {"$ref": "x"}'}]}


def send(*parts: bytes) -> tuple[int, bytes, bytes | None]:
    """Status and body of the answer, and what the application behind it was given."""
    waiting = [{"type": "http.request", "body": part, "more_body": n + 1 < len(parts)} for n, part in enumerate(parts)]
    sent: list[Any] = []
    got: list[bytes] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        got.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"yes"})

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Honest(app)({"type": "http", "path": "/v1/x", "method": "POST"}, receive, send))
    return sent[0]["status"], sent[1]["body"], got[0] if got else None


@pytest.mark.parametrize(
    "extra",
    [
        {"structured_outputs": {"json": BAD}},
        {"structured_outputs": {"json": json.dumps(BAD)}},
        {"structured_outputs": {"json": '{"\\u0024ref": "x\\nFORGED"}'}},
        {"structured_outputs": {"json": '{"$ref": "x\\nFORGED", "$ref": "#"}'}},
        {"structured_outputs": {"json": {"anyOf": [{"items": BAD}]}}},
        {"structured_outputs": {"json": {"$ref": "#/a\nb"}}},
        {"structured_outputs": {"structural_tag": json.dumps({"structures": [{"schema": BAD}]})}},
        {"structured_outputs": {"grammar": 'start: o\no: %json {"$ref": "x\\nFORGED"}'}},
        {"structured_outputs": {"grammar": 'start: o\no: %json {"\\u0024ref": "x\\nFORGED"}'}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": BAD}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": BAD}}}}]},
        {"prompt_logprobs": 0},
        {"echo": True},
        {"prompt": "short", "prompt_logprobs": 0},
        {"prompt": "short", "sampling_params": {"prompt_logprobs": 0}},
        {"sampling_params": {"prompt_logprobs": 0}},
        {"prompt": [1] * (LARGEST_PROMPT + 1), "prompt_logprobs": 0},
        {"prompt": ["a", [1] * (LARGEST_PROMPT + 1)], "prompt_logprobs": 0},
        {"prompt": "é" * LARGEST_PROMPT, "echo": True, "logprobs": 0},
    ],
)
def test_it_refuses_in_openais_shape(extra: Any) -> None:
    plain = json.dumps({**CHAT, **extra})
    hidden = plain.replace("$ref", "\\u0024ref").replace("prompt_l", "\\u0070rompt_l")
    for body in (plain.encode(), plain.encode("utf-16"), plain.encode("utf-32"), hidden.encode()):
        status, answer, got = send(body[:7], body[7:])
        assert (status, got) == (400, None)
        assert json.loads(answer)["error"]["code"] == 400
        assert b"FORGED" not in answer


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"structured_outputs": {"json": {"$defs": {"a": {"type": "string"}}, "$ref": "#/$defs/a"}}},
        {"structured_outputs": {"grammar": 'root ::= "a"\n'}, "user": "$ref"},
        {"tools": [{"function": {"description": "$ref\nline", "parameters": {"properties": {"$ref": {"type": "n"}}}}}]},
        {"echo": False, "prompt": "a" * 9999},
    ],
)
def test_it_hands_on_what_is_legitimate(extra: Any) -> None:
    body = json.dumps({**CHAT, **extra}).encode()
    assert send(body[:5], b"", body[5:]) == (200, b"yes", body)


def test_it_bounds_what_it_reads_and_survives_what_is_no_json() -> None:
    canary = json.dumps({"model": "m", "prompt": [1] * LARGEST_PROMPT, "prompt_logprobs": 0}).encode()
    assert send(canary) == (200, b"yes", canary)
    for long in ([1] * (LARGEST_PROMPT + 1), "\u00e9" * LARGEST_PROMPT, ["a", [1] * (LARGEST_PROMPT + 1)]):
        assert send(json.dumps({"prompt": long, "echo": True, "logprobs": 0}).encode())[0] == 400
    half = b" " * (LARGEST_BODY // 2 + 1)
    assert send(half, half)[0] == 413
    assert send(b'{"$ref": ')[0] == 200
    assert wrong_with(b'{"$ref":' + b"[" * 100_000) is not None
    assert wrong_with(b'{"$ref":' * 150 + b"1" + b"}" * 150) is not None


def test_the_operator_may_allow_longer_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = json.dumps({"model": "m", "prompt": [1] * 2000, "prompt_logprobs": 5}).encode()
    assert "ANTANGELMED_PROMPT_LOGPROBS" in str(wrong_with(asked))
    monkeypatch.setenv("ANTANGELMED_PROMPT_LOGPROBS", "2000")
    assert wrong_with(asked) is None
