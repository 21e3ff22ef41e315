"""What no client may ask for: a line of its own in the log, or memory that no plan counts.

xgrammar (0.2.8, cpp/json_schema_converter.cc:1499) prints a schema's `$ref` as it stands, past every log formatter,
unless it is `#` or begins with `#/`; such a reference means nothing to it. Other strings of schemas, regular
expressions, grammars and tags were tried with line breaks: it prints none, or escapes them.
Log-probabilities of a prompt: vLLM's gpu_model_runner.py (0.32) computes float32 logits over the whole vocabulary for
all of a step's tokens at once, 8192 of them are 5 GB, and a copy.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

LARGEST_BODY = 32 << 20  # bytes; a prompt of 128 K tokens is under 1 MiB
LARGEST_PROMPT = 512  # tokens with log-probabilities of the prompt; the canary's are shorter
# In the engine's environment, more of them: for `perf parity` of long prompts, on a server that has no other clients.
PROMPT_LOGPROBS = "ANTANGELMED_PROMPT_LOGPROBS"
DEEPEST = 100  # levels; vLLM 0.32 itself refuses schemas beyond 64
# What is looked at closer: these words, ASCII letters that are escaped (which may hide them), and UTF-16 or UTF-32.
_SUSPECT = re.compile(rb'\$ref|prompt_logprobs|"echo"|%json|\\u00[2-7]|\x00')
_JSON_IN_TEXT = ("json", "structural_tag")  # keys whose text is read as JSON


class _Pairs(list[tuple[str, Any]]):
    """An object with all of its keys, those too that stand there twice."""


def wrong_with(body: bytes) -> str | None:
    """Return why a request's body is refused, None if it is not. What is no JSON is left to the server."""
    if not _SUSPECT.search(body):
        return None
    try:
        request = json.loads(body, object_pairs_hook=_Pairs)
        return _prompt_logprobs(request) or _schemas(request)
    except RecursionError:
        return f"the request is nested more than {DEEPEST} levels deep"
    except ValueError:
        return None


def _schemas(request: Any) -> str | None:
    waiting = [(request, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            return f"the request is nested more than {DEEPEST} levels deep"
        if isinstance(value, _Pairs):
            for key, inner in value:
                if key == "$ref" and isinstance(inner, str) and not _is_local(inner):
                    return "a schema's '$ref' must be '#' or begin with '#/', without control characters"
                if key == "grammar" and isinstance(inner, str) and "%json" in inner and re.search(r"\$ref|\\u", inner):
                    return "a grammar's '%json' must have no '$ref' and no escapes: give the schema as 'json'"
                if key in _JSON_IN_TEXT and isinstance(inner, str):
                    try:
                        inner = json.loads(inner, object_pairs_hook=_Pairs)
                    except ValueError:
                        return f"'{key}' is not JSON"
                waiting.append((inner, depth + 1))
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]
    return None


def _is_local(reference: str) -> bool:
    return (reference == "#" or reference.startswith("#/")) and reference.isprintable()


def _prompt_logprobs(request: Any) -> str | None:
    if not isinstance(request, _Pairs):
        return None
    most = int(os.environ.get(PROMPT_LOGPROBS) or LARGEST_PROMPT)
    found = dict(request)
    inner = found.get("sampling_params")  # of /inference/v1/generate
    inside = isinstance(inner, _Pairs) and dict(inner).get("prompt_logprobs") is not None
    # vLLM takes 0, too, for a wish; a chat's top_logprobs are 0 unless given (chat_completion/protocol.py, 0.32).
    echoed = found.get("echo") and ("messages" in found or found.get("logprobs") is not None)
    if found.get("prompt_logprobs") is None and not echoed and not inside:
        return None
    prompt = found.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    # A token of text is a byte or more.
    sizes = [len(one.encode(errors="replace")) if isinstance(one, str) else len(one)
             for one in prompts if isinstance(one, (str, list))]  # fmt: skip
    is_completion = "messages" not in found and not inside  # elsewhere a prompt may stand beside what is read
    if is_completion and len(sizes) == len(prompts) and max(sizes) <= most:
        return None
    return (
        f"log-probabilities of a prompt are given for completions of up to {most} tokens (or bytes of text); "
        f"{PROMPT_LOGPROBS} in the server's environment allows more, and takes memory that no plan counts"
    )
