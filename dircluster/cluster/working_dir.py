"""The files that travel to a cluster: which of them look like secrets, which are large, and all of them packed."""

from __future__ import annotations

import codecs
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

NAMES = re.compile(
    r"(.*\.)?env(\..*|rc)?|.*\.(pem|key|p8|p12|pfx|jks|jceks|keytab|keystore|kdbx|tfstate|tfvars|ppk|gpg|age|ovpn)"
    r"|id_(rsa|dsa|ecdsa|ed25519)(?!.*\.pub$).*|.*credentials.*|.*service[-_]account.*\.json|kubeconfig.*|krb5cc.*"
    r"|[._](git-credentials|npmrc|pypirc|htpasswd|s3cfg|boto|dockercfg|databrickscfg)|(.*[._])?(netrc|pgpass(\.conf)?)"
    r"|\.my(login)?\.cnf|kaggle\.json|rclone\.conf|o?auth\.json|client[-_]?secrets?.*\.json|secrets?(\..*)?"
    r"|.*auth[-_]token.*|((.*[-_.])?(token|creds?|(api|access|secret)[-_]?keys?)|.*passw(or)?ds?)(\.(txt|json|ya?ml))?",
    re.IGNORECASE,
)
_KEYS = rb"secret_?access_?key|secret_?key|api_?key|client_?secret|(auth|access|session|refresh|bearer)_?token"
_PASSWORDS = rb"passw(or)?d|passphrase|[_-]pwd"
_VALUE = (
    rb"(?!(null|none|true|false|str|string|required|optional|password|x+)\b)(?!\S*\.\.\.)"
    rb"[\w+#@^][^\s\"'`<>{}()\[\]$,;]{2,}"
)
"""What is typed for a secret, however short; what stands for one ($NAME, {name}, <name>, a path) begins otherwise."""
CONTENT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----(\s|\\+[nr])"
    rb"|LS0tLS1CRUdJTi(BQUkl|B[ES]U0EgUFJJ|BFQyB|BPUEV|BFTkN)"  # the same in base64
    rb"|\bA[KS]IA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{35}|\bGOCSPX-[\w-]{20,}|\bya29\.[\w-]{20,}|\bgithub_pat_\w{20,}"
    rb"|\b(gh[oprsu]|hf|npm|glp(at|tt)|xox[abeprs])[_-][A-Za-z0-9-]{20,}|\bsk-[\w-]{24,}|\b[rs]k_live_\w{16,}"
    rb"|\bpypi-AgE[\w-]{20,}|\bhv[bsr]\.[\w-]{20,}|\bdapi[0-9a-f]{32}|\bAGE-SECRET-KEY-1\w{20,}"
    rb"|\beyJ[\w-]{10,}\.eyJ[\w-]{8,}\.[\w-]{20,}"  # JWT
    rb"|\bAccountKey=[A-Za-z0-9/+]{20,}|[?&]sig=[\w%+/]{40,}|\bhooks\.slack\.com/services/T\w+/B\w+/\w{16,}"
    rb"|(?i:" + _KEYS + rb"|password)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+_-]{20,}"
    rb"|(?i:\bauthorization[\"']?\s*[=:]\s*[\"']?(bearer|basic|token)\s+)[\w+/.~-]{16,}"
    rb"|\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S"
    rb"|\"auth\"\s*:\s*\"[A-Za-z0-9/+]{8,}=*\"|\"key\"\s*:\s*\"[0-9a-f]{32}\""
    rb"|\b[a-z][a-z0-9+]{0,20}://[^\s/:@\"'`<>{}$()\[\]]*:[^\s/:@\"'`<>{}$()\[\]]{2,}@[\w.-]+"
    rb"|\b[A-Z0-9_]+_PASSW(OR)?D([\"']\]\s*=\s*[\"']|=[\"']?)" + _VALUE
)
SETTING = re.compile(
    rb"(^|[{,])[ \t]*(-[ \t]+)?(export[ \t]+|env[ \t]+)?[\"']?[\w.-]*(" + _KEYS + rb"|" + _PASSWORDS + rb")[\"']?"
    rb"[ \t]*[=:][ \t]*[\"']?" + _VALUE + rb"[\"']?[ \t]*([,;}#\r]|$)",
    re.IGNORECASE | re.MULTILINE,
)
"""A setting whose name says that its value is a secret, in what is no source."""
PLAIN = {".py", ".pyi"}
"""Source: its own name, and what it sets, look like secrets there; only what it holds in full is looked for."""
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
        content = _ascii(file.read_bytes()) if file.stat().st_size <= LARGEST else b""
    except OSError:
        return False
    found = CONTENT.search(content) or (file.suffix not in PLAIN and SETTING.search(content))
    return bool(found)


def _ascii(content: bytes) -> bytes:
    """``content``, in one byte a character where it is UTF-16."""
    doubled = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0\0" in (content[:3:2], content[1:4:2])
    return content.replace(b"\0", b"") if doubled else content
