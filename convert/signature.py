"""`manifest.sig`: an Ed25519 signature over the bytes of `manifest.json`, whose hashes cover every other file.

One line: ``ed25519``, the public key's fingerprint as `ssh-keygen -l` prints it, the signature in base64. Any tool that
knows Ed25519 can check it; the `cryptography` library does so here, imported only when a key is there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend.errors import UserError
from convert.manifest import MANIFEST, SIGNATURE, manifest_bytes, write_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSPHRASE = "ANTANGELMED_KEY_PASSPHRASE"
MAX_KEY_BYTES = 1 << 16
OTHERS = 0o077


def sign(directory: Path, key_file: Path) -> None:
    """Write ``directory``'s `manifest.sig`. Raises `UserError` if there is no manifest or the key cannot be used."""
    key = private_key(key_file)
    content = manifest_bytes(directory)
    write_whole(directory / SIGNATURE, _line(fingerprint(key.public_key()), key.sign(content)))


def verify_signature(directory: Path, public_key_file: Path) -> bytes:
    """Return the bytes of the manifest if its signature is there and is this key's. Raises `UserError` if not.

    They are what is to be parsed then: a file that is read a second time may be another.
    """
    key = public_key(public_key_file)
    content = manifest_bytes(directory)
    signer, signature = _read(directory / SIGNATURE)
    from cryptography.exceptions import InvalidSignature

    if signer != fingerprint(key):
        raise UserError(f"{directory / SIGNATURE}: made with key {signer}, {public_key_file} is {fingerprint(key)}")
    try:
        key.verify(signature, content)
    except InvalidSignature:
        raise UserError(
            f"{directory / MANIFEST}: is not what {public_key_file} signed: it was changed after it was signed"
        ) from None
    return content


def _line(signer: str, signature: bytes) -> str:
    return f"ed25519 {signer} {base64.b64encode(signature).decode()}\n"


def _read(file: Path) -> tuple[str, bytes]:
    if not file.is_file():
        raise UserError(
            f"{file}: missing, so {MANIFEST} is not signed; `python -m convert manifest DIR --sign KEY` does"
        )
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_KEY_BYTES).decode("ascii")
        _, signer, encoded = text.split()
        signature = base64.b64decode(encoded, validate=True)
        if text != _line(signer, signature) or not signer.isprintable():
            raise ValueError
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, binascii.Error):
        raise UserError(f"{file}: not a signature of this tool; the file is damaged") from None
    return signer, signature


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return ``SHA256:…`` of a public key, as OpenSSH writes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def private_key(file: Path) -> Ed25519PrivateKey:
    """Read a private key, PEM (PKCS 8) or OpenSSH; its passphrase comes from the environment.

    Raises `UserError` for one that other users can read, as ssh does, and for any other kind of key.
    """
    content = _key_bytes(file)
    mode = file.stat().st_mode & 0o777
    if mode & OTHERS:
        raise UserError(f"{file}: mode {mode:04o}, a private key that other users can reach: chmod 600 it")
    ed25519, serialization = _library()
    ssh = b"OPENSSH PRIVATE KEY" in content
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    key = _load(file, "private", load, content, None)
    if key is None:
        passphrase = os.environ.get(PASSPHRASE)
        if not passphrase:
            raise UserError(f"{file}: is encrypted; put its passphrase into the environment variable {PASSPHRASE}")
        key = _load(file, "private", load, content, passphrase.encode())
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(f"{file}: not an Ed25519 key; `openssl genpkey -algorithm ed25519` makes one")
    return key


def public_key(file: Path) -> Ed25519PublicKey:
    """Read a public key, PEM or OpenSSH. Raises `UserError` for a private one and for any other kind of key."""
    content = _key_bytes(file)
    ed25519, serialization = _library()
    if b"PRIVATE KEY" in content:
        raise UserError(f"{file}: a private key; to check signatures give the public one (`openssl pkey -pubout`)")
    ssh = content.startswith(b"ssh-")
    load = serialization.load_ssh_public_key if ssh else serialization.load_pem_public_key
    key = _load(file, "public", load, content)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UserError(f"{file}: not an Ed25519 key, and no other kind is used here")
    return key


def _load(file: Path, kind: str, load: Any, content: bytes, *passphrase: bytes | None) -> Any:
    """Call the library; None for a key that needs a passphrase and got none."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(content, *passphrase)
    except TypeError:
        return None
    except UnsupportedAlgorithm:
        raise UserError(f"{file}: a kind or cipher of key that is not supported here; write it as PEM") from None
    except ValueError:
        wrong = f"or {PASSPHRASE} is not its passphrase" if passphrase and passphrase[0] else "or it is damaged"
        raise UserError(f"{file}: not a {kind} key in PEM or OpenSSH form, {wrong}") from None


def _key_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_KEY_BYTES)
    except OSError as error:
        raise UserError(f"{file}: the key cannot be read: {error.strerror}") from None


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UserError("signatures need the package cryptography: `pip install cryptography`") from None
    return ed25519, serialization
