"""Object storage of one's own: a private authority's certificate, regions of other names, virtual hosts."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from s3fs import S3FileSystem

from infra.local_cluster import BUCKET, Cluster
from tests.jobs import Outcome, run_job

HOST = "s3.private.test"
RUN = ("digits_smoke", "--launcher", "local", "--tracking.no-enabled", "--pretrain.epochs", "1", "--dir.epochs", "1")


def certify(folder: Path) -> None:
    """An authority (ca.pem), and the key and certificate of a server at 127.0.0.1 or HOST that it has signed."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)

    def signed(name: str, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        maker = x509.CertificateBuilder().subject_name(subject).issuer_name(authority).public_key(key.public_key())
        maker = maker.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        maker = maker.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key())
        maker = maker.add_extension(issuer, critical=False)
        maker = maker.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return maker.sign(own, hashes.SHA256())

    own, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority of one's own")])
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName(HOST), x509.DNSName(f"*.{HOST}")]
    pem = serialization.Encoding.PEM
    root = signed("an authority of one's own", own, x509.BasicConstraints(ca=True, path_length=None))
    (folder / "ca.pem").write_bytes(root.public_bytes(pem))
    (folder / "server.pem").write_bytes(signed("s3", key, x509.SubjectAlternativeName(names)).public_bytes(pem))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "server.key").write_bytes(key.private_bytes(pem, *form))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An S3 server that speaks TLS alone, and knows its buckets by host names too."""
    made = Cluster(tmp_path_factory.mktemp("private"))
    certify(made.folder)
    made.s3_scheme = "https"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE"):
            patch.setenv(name, str(made.folder / "ca.pem"))
        try:
            files = (f"-s3.cert.file={made.folder}/server.pem", f"-s3.key.file={made.folder}/server.key")
            made.start_s3(options=(*files, f"-s3.domainName={HOST}"))
            yield made
        finally:
            made.down()


@pytest.fixture
def train(store: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run jobs/train.py with the store's keys."""
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION", "SSL_CERT_FILE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(store.folder / "ca.pem"))

    def run(*words: str) -> Outcome:
        S3FileSystem.clear_instance_cache()  # it remembers servers and credentials
        done = run_job("train", *RUN, *words, folder=tmp_path)
        S3FileSystem.clear_instance_cache()
        return done

    return run


@pytest.mark.slow
def test_a_private_authority_and_a_region_of_its_own(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--storage.uri", f"s3://{BUCKET}/private", "--storage.region", "fsn1")
    done = train(*words)
    assert done.code == 0, done.out + done.err
    assert done.summary["checkpoint"].startswith(f"s3://{BUCKET}/private/dir-")
    monkeypatch.delenv("AWS_CA_BUNDLE")
    strange = train(*words)
    assert strange.code == 2
    (line,) = strange.err.splitlines()
    assert "shows a certificate that is not trusted here (SSL validation failed" in line
    assert "set AWS_CA_BUNDLE to its file" in line


@pytest.mark.slow
def test_virtual_hosts_alone(store: Cluster, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    inner = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **named: Any) -> Any:
        if str(host).endswith(HOST):
            asked.add(host)
            host = "127.0.0.1"
        return inner(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    (tmp_path / "aws").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.s3_url.replace("127.0.0.1", HOST))
    done = train("--storage.uri", f"s3://{BUCKET}/virtual", "--storage.region", "auto")
    assert done.code == 0, done.out + done.err
    assert asked == {f"{BUCKET}.{HOST}"}
