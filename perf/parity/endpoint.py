"""An OpenAI endpoint that says what it computes of given tokens: `/v1/completions` of vLLM, vLLM-Ascend or the like.

One request per prompt: ``prompt_logprobs`` for what the server makes of the prompt, and a few greedy tokens with
``logprobs`` for its decode steps. The key is sent and never shown; no proxy is used and no redirect is followed.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ascend.errors import UserError, suggest

TIMEOUT = 600.0  # seconds; one prompt on a loaded server
Logprobs = dict[int, float]


@dataclass(frozen=True)
class Answer:
    """What a server computes of one prompt: per position after the first, its best tokens and the given one.

    prompt: of tokens 1, 2, …; decoded, tokens: the same of the tokens that it generated, greedily, and which these are.
    """

    prompt: list[Logprobs]
    decoded: list[Logprobs]
    tokens: list[int]


class Server:
    """A running server. All errors are `UserError`: one line that says what the server did not do."""

    def __init__(self, url: str, key: str | None, model: str | None, top: int) -> None:
        parts = urlsplit(url)
        host = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", parts.netloc)
        if host is None or parts.query or parts.path.rstrip("/") not in ("", "/v1"):
            raise UserError("the endpoint must be http(s)://HOST:PORT, without user name, path or query")
        self.url, self.top = f"{parts.scheme}://{parts.netloc}", top
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect()).open
        served = self._call("/v1/models").get("data")
        if not isinstance(served, list) or not served:
            raise UserError(f"{self.url}/v1/models names no model: this is no OpenAI endpoint")
        # An adapter names the model that it changes as its parent.
        names = [str(one.get("id")) for one in served if not one.get("parent")]
        if model is not None and model not in names:
            raise UserError(f"{self.url} does not serve '{model}'{suggest(model, names)}")
        if model is None and len(names) != 1:
            raise UserError(f"{self.url} serves {', '.join(names)}: say which with --served-model")
        self.model = model or names[0]

    @property
    def version(self) -> str | None:
        """What vLLM says at `/version`; None where nobody does."""
        try:
            return str(self._call("/version")["version"])
        except (UserError, KeyError):
            return None

    def answer(self, prompt: list[int], steps: int) -> Answer:
        """Have the prompt computed, and ``steps`` greedy tokens after it. Asks for fewer logprobs where it must."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": steps, "temperature": 0, "ignore_eos": True}
        body |= {"prompt_logprobs": self.top, "logprobs": self.top, "return_tokens_as_token_ids": True}
        try:
            choice = self._call("/v1/completions", body)["choices"][0]
        except _RefusedError as refused:
            allowed = re.search(r"max allowed: (\d+)", str(refused))
            if allowed is None or not 0 < int(allowed[1]) < self.top:
                raise
            self.top = int(allowed[1])
            return self.answer(prompt, steps)
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url}/v1/completions answered without a choice") from None
        return self._read(choice, len(prompt))

    def _read(self, choice: Any, length: int) -> Answer:
        if not isinstance(choice, dict) or choice.get("prompt_logprobs") is None:
            raise UserError(f"{self.url} gives no prompt_logprobs: it is not vLLM, or they are turned off")
        try:
            prompt = [
                {int(token): float(one["logprob"]) for token, one in position.items()}
                for position in choice["prompt_logprobs"][1:]
            ]
            given = choice["logprobs"]
            decoded = [{_token(name): float(value) for name, value in one.items()} for one in given["top_logprobs"]]
            tokens = [_token(name) for name in given["tokens"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.url}: its logprobs are not in vLLM's form, with token ids") from None
        if len(prompt) != length - 1 or len(decoded) != len(tokens) or not tokens:
            raise UserError(f"{self.url}: logprobs of {len(prompt)} positions for a prompt of {length} tokens")
        return Answer(prompt, decoded, tokens)

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._open(request, timeout=TIMEOUT) as response:
                document = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from None
        except urllib.error.URLError as error:
            raise UserError(f"{self.url} cannot be reached: {error.reason}") from None
        except ValueError:
            raise UserError(f"{self.url}{path} did not answer with JSON: this is no OpenAI endpoint") from None
        except (OSError, HTTPException) as error:
            raise UserError(f"{self.url}{path}: {type(error).__name__} while it answered") from None
        if not isinstance(document, dict):
            raise UserError(f"{self.url}{path} did not answer with a JSON object: this is no OpenAI endpoint")
        return document

    def _refused(self, path: str, error: urllib.error.HTTPError) -> UserError:
        if error.code in (401, 403):
            return UserError(f"{self.url} refuses the API key ({error.code}): give --api-key-file or set VLLM_API_KEY")
        if 300 <= error.code < 400:
            return UserError(f"{self.url}{path} redirects ({error.code}): give the server's own address")
        words = " ".join(error.read(2000).decode(errors="replace").split())
        if "vocab" in words:
            return UserError(f"{self.url} serves another model: a token of the record is not in its vocabulary")
        found = re.search(r'"message": ?"([^"]*)', words)
        return _RefusedError(f"{self.url}{path}: {error.code}, {(found[1] if found else words)[:300]}")


class _RefusedError(UserError):
    """The server's own words about a request."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another place: it becomes an error."""

    def redirect_request(self, *_: Any) -> None:
        """Do not follow."""


def api_key(file: Path | None) -> str | None:
    """Return the key in the file, or of VLLM_API_KEY or OPENAI_API_KEY; None without any. Raises `UserError`."""
    if file is None:
        key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
        source = "the API key in the environment"
    else:
        source = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError):
            raise UserError(f"{source}: cannot be read") from None
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{source}: a key is one word of ASCII characters")
    return key


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))
