"""What looks like a secret among files that would travel to a cluster: by its name, or by how its content reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

NAMES = re.compile(
    r"(.*\.)?env(\..*|rc)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|tfstate|tfvars)|id_(rsa|dsa|ecdsa|ed25519)(?!.*\.pub$).*"
    r"|[._](netrc|pgpass|git-credentials|npmrc|pypirc|htpasswd)|.*credentials.*|.*service[-_]account.*\.json"
    r"|secrets?\..*|.*auth[-_]token.*|kubeconfig.*",
    re.IGNORECASE,
)
CONTENT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s|\bAKIA[0-9A-Z]{16}\b|\b(ghp|hf|glpat|xox[bp])[_-][A-Za-z0-9-]{20,}"
    rb"|(?i:aws_secret_access_key|secret_key|password|api_key|auth_token)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+_-]{20,}"
)
PLAIN = {".py", ".pyi"}
"""Source: names of classes and settings look like secrets there; only its content is looked at."""
LARGEST = 1 << 20
"""Bytes of a file whose content is looked at."""


def secrets_among(files: Iterable[Path]) -> list[Path]:
    """Those of the files that look like secrets."""
    return [file for file in files if _is_secret(file)]


def _is_secret(file: Path) -> bool:
    if file.suffix not in PLAIN and NAMES.fullmatch(file.name):
        return True
    try:
        return file.stat().st_size <= LARGEST and CONTENT.search(file.read_bytes()) is not None
    except OSError:
        return False
