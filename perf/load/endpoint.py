"""Who answers: what an OpenAI endpoint says about itself. No proxy is used and no redirect takes the key elsewhere."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ascend.errors import UserError, suggest

SECONDS = 10.0
KEY_VARIABLES = ("VLLM_API_KEY", "OPENAI_API_KEY")
# Prompt tokens that vLLM's prefix cache knew, a line per engine; before vLLM 0.10 with "gpu_".
PREFIX_HITS = re.compile(r"^(vllm:(?:gpu_)?prefix_cache_hits_total)(?:\{.*\})? +([0-9.eE+]+)", re.MULTILINE)


@dataclass(frozen=True)
class Endpoint:
    """A server's address without ``/v1``, the model it is asked for, and what it says of itself."""

    base_url: str
    model: str
    engine: str = "unknown"
    max_model_len: int | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine."""
        return is_loopback(self.base_url)


def is_loopback(url: str) -> bool:
    """Whether the address is this machine's own."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def connect(base_url: str, directory: Path, served_name: str | None, api_key: str | None) -> Endpoint:
    """Ask the endpoint who it is. Raises `UserError` if it is not there, refuses us, or serves another model.

    The model is ``served_name``, or the one that bears the checkpoint directory's name or path.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UserError("--base-url must be http://HOST:PORT or https://HOST:PORT, without user or password")
    base_url = base_url.rstrip("/").removesuffix("/v1")
    answer = _get(f"{base_url}/v1/models", api_key)
    models = {one["id"]: one for one in answer.get("data", []) if isinstance(one, dict) and "id" in one}
    name = served_name or _named_after(models, directory)
    if name is None or name not in models:
        asked = served_name or directory.resolve().name
        raise UserError(
            f"{base_url} does not serve '{asked}'{suggest(asked, models)} but {', '.join(models) or 'nothing'}; if it "
            "is the same checkpoint, say --served-model-name"
        )
    return Endpoint(
        base_url, name, _engine(base_url, models[name], api_key), models[name].get("max_model_len"), api_key
    )


def prefix_cache_hits(endpoint: Endpoint) -> float | None:
    """Return the prompt tokens that the server's prefix cache has known since its start, None where it does not tell.

    Read from ``/metrics``, which is not below ``/v1``.
    """
    try:
        text = _fetch(f"{endpoint.base_url}/metrics", endpoint.api_key).decode(errors="replace")
    except UserError:
        return None
    by_name: dict[str, float] = {}
    for name, count in PREFIX_HITS.findall(text):
        by_name[name] = by_name.get(name, 0.0) + float(count)
    return max(by_name.values(), default=None)  # one count under two names in versions between


def read_key(file: Path | None) -> str | None:
    """Return the API key from the file or the environment, None if there is none."""
    if file is None:
        return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: cannot be read ({type(error).__name__})") from None
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"--api-key-file {file}: holds no key of one line")
    return key


def _named_after(models: dict[str, Any], directory: Path) -> str | None:
    path = str(directory.resolve())
    names = (path, directory.resolve().name)
    found = [name for name, one in models.items() if name in names or str(one.get("root", "")).rstrip("/") == path]
    return found[0] if found else None


def _engine(base_url: str, model: dict[str, Any], api_key: str | None) -> str:
    try:
        version = _get(f"{base_url}/version", api_key).get("version")  # vLLM; others have no such path
    except UserError:
        version = None
    return f"{model.get('owned_by') or 'unknown'} {version}" if version else "unknown"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect becomes an error."""

    def redirect_request(self, *_: Any) -> None:
        """Do not follow."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())


def _get(url: str, api_key: str | None) -> dict[str, Any]:
    content = _fetch(url, api_key)
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        raise UserError(f"{url}: the answer is not JSON; is this an OpenAI endpoint?") from None


def _fetch(url: str, api_key: str | None) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with _OPENER.open(request, timeout=SECONDS) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"{url}: the server wants {'another' if api_key else 'an'} API key ({error.code}); give it in "
                f"--api-key-file or {' or '.join(KEY_VARIABLES)}"
            ) from None
        if 300 <= error.code < 400:
            raise UserError(f"{url} redirects ({error.code}): give the server's own address") from None
        raise UserError(f"{url}: the server answers {error.code}; is this an OpenAI endpoint?") from None
    except (OSError, http.client.HTTPException) as error:  # refused, no such host, no answer in time, cut off
        reason = getattr(error, "reason", None) or error
        raise UserError(f"nothing answers at {url} ({reason}); is the server up, and --base-url right?") from None
