"""The files that travel to a cluster: which of them look like secrets, which are large, and all of them packed."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

NAMES = re.compile(
    r"(.*\.)?env(\..*|rc)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|tfstate|tfvars|ppk|gpg|ovpn)"
    r"|id_(rsa|dsa|ecdsa|ed25519)(?!.*\.pub$).*|.*credentials.*|.*service[-_]account.*\.json|kubeconfig.*"
    r"|[._](netrc|pgpass|git-credentials|npmrc|pypirc|htpasswd|s3cfg|boto|dockercfg)|kaggle\.json|rclone\.conf"
    r"|secrets?\..*|.*auth[-_]token.*|(.*[-_.])?(token|passw(or)?ds?|(api|access|secret)[-_]?keys?)(\.(txt|json|ya?ml))?",
    re.IGNORECASE,
)
CONTENT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s|\bA[KS]IA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{35}|\bgithub_pat_\w{20,}"
    rb"|\b(gh[opsu]|hf|glpat|xox[bp])[_-][A-Za-z0-9-]{20,}|\bsk-[\w-]{24,}|\bAccountKey=[A-Za-z0-9/+]{20,}"
    rb"|(?i:secret_?access_?key|secret_key|password|api_key|auth_token)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+_-]{20,}"
    rb"|\"auth\"\s*:\s*\"[A-Za-z0-9/+]{8,}=*\"|\"key\"\s*:\s*\"[0-9a-f]{32}\""
    rb"|\b[a-z][a-z0-9+]*://[^\s/:@\"'`<>{}$()\[\]]+:[^\s/:@\"'`<>{}$()\[\]]{3,}@[\w.-]+"
)
PLAIN = {".py", ".pyi"}
"""Source: names of classes and settings look like secrets there; only its content is looked at."""
LARGEST = 1 << 20
"""Bytes of a file whose content is looked at, and of one that is not worth a word."""


def secrets_among(files: Iterable[Path]) -> list[Path]:
    """Those of the files that look like secrets."""
    return [file for file in files if _is_secret(file)]


def large_among(files: Iterable[Path]) -> list[Path]:
    """Those of the files that are large for something that every node fetches, the largest first."""
    sizes = {file: file.stat().st_size for file in files}
    return sorted((file for file, size in sizes.items() if size > LARGEST), key=lambda file: -sizes[file])


def pack(files: Iterable[Path], folder: Path, package: Path) -> None:
    """Write those files of ``folder`` as a compressed ``package``, .zip; the same files have the same bytes."""
    with zipfile.ZipFile(package, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(str(file.relative_to(folder)))
            entry.external_attr = file.stat().st_mode << 16
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)


def _is_secret(file: Path) -> bool:
    if file.suffix not in PLAIN and NAMES.fullmatch(file.name):
        return True
    try:
        return file.stat().st_size <= LARGEST and CONTENT.search(file.read_bytes()) is not None
    except OSError:
        return False
