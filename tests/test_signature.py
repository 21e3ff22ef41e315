"""Signed manifests: what is signed is what is there, by the right key, and keys are kept as ssh wants them kept."""

from __future__ import annotations

import base64
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from convert.demo import write_demo
from convert.manifest import MANIFEST, SIGNATURE, write_manifest
from convert.signature import PASSPHRASE, fingerprint, private_key, public_key, sign, verify_signature
from convert.verify import verify
from tests.tiny import user_error

PEM, SSH = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
PKCS8 = serialization.PrivateFormat.PKCS8
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
PLAIN_KEY = serialization.NoEncryption()


def write_key(file: Path, key: Ed25519PrivateKey | rsa.RSAPrivateKey, passphrase: str | None = None) -> Path:
    """A private key, and its public one beside it as ``NAME.pub``."""
    secret = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else PLAIN_KEY
    file.write_bytes(key.private_bytes(PEM, PKCS8, secret))
    file.chmod(0o600)
    file.with_name(f"{file.name}.pub").write_bytes(key.public_key().public_bytes(PEM, SPKI))
    return file


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("keys") / "key.pem", Ed25519PrivateKey.generate())


@pytest.fixture(scope="module")
def pub(key: Path) -> Path:
    return key.with_name("key.pem.pub")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Path:
    path = tmp_path_factory.mktemp("signed") / "tiny"
    write_demo(path)
    write_manifest(path, command={"command": "test"}, source={})
    sign(path, key)
    return path


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "copy"))


def test_what_was_signed_is_what_is_there(signed: Path, pub: Path) -> None:
    assert verify_signature(signed, pub) == (signed / MANIFEST).read_bytes()
    assert (signed / SIGNATURE).stat().st_mode & 0o777 == 0o640
    kind, signer, encoded = (signed / SIGNATURE).read_text().split()
    assert (kind, signer) == ("ed25519", fingerprint(public_key(pub)))
    assert len(base64.b64decode(encoded)) == 64


def test_signing_is_deterministic(copy: Path, key: Path) -> None:
    before = (copy / SIGNATURE).read_bytes()
    sign(copy, key)
    assert (copy / SIGNATURE).read_bytes() == before


def test_openssl_agrees(signed: Path, pub: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    (tmp_path / "raw").write_bytes(base64.b64decode((signed / SIGNATURE).read_text().split()[2]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(pub), "-rawin", "-in", str(signed / MANIFEST)]
    done = subprocess.run([*command, "-sigfile", str(tmp_path / "raw")], capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in done.stdout + done.stderr


def test_keys_of_openssl_and_openssh(copy: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("openssl or ssh-keygen is not installed")
    pem, pub, ssh = tmp_path / "pem", tmp_path / "pub", tmp_path / "ssh"
    for command in (
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(pem)],
        ["openssl", "pkey", "-in", str(pem), "-pubout", "-out", str(pub)],
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    pem.chmod(0o600)
    for private, public in ((pem, pub), (ssh, tmp_path / "ssh.pub")):
        sign(copy, private)
        assert verify_signature(copy, public) == (copy / MANIFEST).read_bytes()
    listed = subprocess.run(["ssh-keygen", "-lf", f"{ssh}.pub"], check=True, capture_output=True, text=True)
    assert fingerprint(public_key(tmp_path / "ssh.pub")) in listed.stdout.split()


def test_a_hundred_flipped_bits_of_manifest_and_signature_are_found(copy: Path, pub: Path) -> None:
    pick, found = random.Random(6), 0
    for turn in range(100):
        file = copy / (MANIFEST, SIGNATURE)[turn % 2]
        good = file.read_bytes()
        data, bit = bytearray(good), pick.randrange(8 * len(good))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        found += str(copy) in user_error(verify_signature, copy, pub)
        file.write_bytes(good)
    assert found == 100


def changed_shard(path: Path) -> str:
    with (path / "model.safetensors").open("r+b") as stream:
        stream.seek(-8, 2)
        stream.write(b"evil")
    write_manifest(path, command={"command": "test"}, source={})
    return "it was changed after it was signed"


def other_signer(path: Path) -> str:
    changed_shard(path)
    sign(path, write_key(path.parent / "evil.pem", Ed25519PrivateKey.generate()))
    return f"{SIGNATURE}: made with key SHA256:"


def others_signature_under_our_name(path: Path) -> str:
    ours = (path / SIGNATURE).read_text().split()[1]
    other_signer(path)
    kind, _, signature = (path / SIGNATURE).read_text().split()
    (path / SIGNATURE).write_text(f"{kind} {ours} {signature}\n")
    return "it was changed after it was signed"


def one_digit(path: Path) -> str:
    """Still a manifest that parses."""
    text = (path / MANIFEST).read_text()
    at = text.index('"sha256": "') + len('"sha256": "')
    (path / MANIFEST).write_text(text[:at] + ("1" if text[at] == "0" else "0") + text[at + 1 :])
    return "it was changed after it was signed"


def no_signature(path: Path) -> str:
    changed_shard(path)
    (path / SIGNATURE).unlink()
    return f"{SIGNATURE}: missing, so manifest.json is not signed"


def no_manifest(path: Path) -> str:
    (path / MANIFEST).unlink()
    return "has no manifest.json"


def not_parsed_before(path: Path) -> str:
    """What is not signed is not even read as JSON."""
    (path / MANIFEST).write_text("{" * 100_000)
    return "it was changed after it was signed"


@pytest.mark.parametrize(
    "attack",
    [
        changed_shard, other_signer, others_signature_under_our_name, one_digit, no_signature, no_manifest,
        not_parsed_before,
    ],
    ids=lambda attack: attack.__name__,
)  # fmt: skip
def test_an_attack_is_caught_with_the_key(copy: Path, pub: Path, attack: Callable[[Path], str]) -> None:
    expected = attack(copy)
    assert expected in user_error(verify, copy, pub, quick=True)


def test_without_the_key_a_fresh_manifest_passes(copy: Path) -> None:
    changed_shard(copy)
    done = verify(copy, content=False)
    assert done.problems == []
    assert done.signature == "not looked at: no --key"


def test_a_changed_shard_under_a_good_signature(copy: Path, pub: Path) -> None:
    good = (copy / MANIFEST).read_bytes()
    changed_shard(copy)
    (copy / MANIFEST).write_bytes(good)
    done = verify(copy, pub)
    assert done.signature == "good"
    assert [line.partition(":")[0] for line in done.problems] == [str(copy / "model.safetensors")]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602, 0o601])
def test_a_private_key_that_others_can_reach(tmp_path: Path, key: Path, mode: int) -> None:
    file = Path(shutil.copy(key, tmp_path / "key"))
    file.chmod(mode)
    assert f"{file}: mode {mode:04o}, a private key that other users can reach: chmod 600" in user_error(
        private_key, file
    )
    file.chmod(0o400)
    private_key(file)


def test_an_encrypted_key(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = write_key(tmp_path / "key", Ed25519PrivateKey.generate(), "correct horse")
    monkeypatch.delenv(PASSPHRASE, raising=False)
    assert f"is encrypted; put its passphrase into the environment variable {PASSPHRASE}" in user_error(sign, copy, key)
    monkeypatch.setenv(PASSPHRASE, "wrong")
    said = user_error(sign, copy, key)
    assert f"{PASSPHRASE} is not its passphrase" in said
    assert "wrong" not in said
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    sign(copy, key)
    verify_signature(copy, tmp_path / "key.pub")
    private_key(write_key(tmp_path / "plain", Ed25519PrivateKey.generate()))  # the variable does no harm


def test_keys_of_the_wrong_kind(signed: Path, pub: Path, key: Path, tmp_path: Path) -> None:
    other = write_key(tmp_path / "rsa", rsa.generate_private_key(65537, 2048))
    assert "not an Ed25519 key; `openssl genpkey" in user_error(private_key, other)
    assert "not an Ed25519 key" in user_error(verify_signature, signed, tmp_path / "rsa.pub")
    assert "a private key; to check signatures give the public one" in user_error(verify_signature, signed, key)
    closed = Path(shutil.copy(pub, tmp_path / "closed"))
    closed.chmod(0o600)
    assert "not a private key in PEM or OpenSSH form" in user_error(private_key, closed)
    (tmp_path / "empty").touch(0o600)
    for read in (private_key, public_key):
        assert f"{tmp_path / 'empty'}: not a p" in user_error(read, tmp_path / "empty")
        assert "the key cannot be read: No such file" in user_error(read, tmp_path / "nothing")
        assert "the key cannot be read: Is a directory" in user_error(read, tmp_path)
