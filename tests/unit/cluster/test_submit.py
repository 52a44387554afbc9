"""What travels with a job: a clone without data and secrets, and a line where a secret would."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dircluster.cluster.commands import submit
from dircluster.cluster.commands.submit import checked
from dircluster.cluster.runtime.upload import files_sent
from dircluster.cluster.working_dir import large_among, pack, secrets_among
from dircluster.config import ConfigError

LEFT_OUT = (
    *(".env", ".env.local", "prod.env", "a/key.pem", "a/b/server.key", "id_rsa", ".netrc", "aws-credentials.csv"),
    *("my-service-account.json", "infra/auth_token", "terraform.tfstate", ".aws/config", ".ssh/known_hosts"),
    *("big.parquet", "data/train/0.png", "weights.safetensors", "net.pt", "a/last.ckpt", "wandb/run-1/x", "mlruns/0/m"),
    *("notes/.ipynb_checkpoints/a-checkpoint.ipynb", "notes/a.ipynb", "runs/mlflow.db", "cifar-10-python.tar.gz"),
    *("labels.csv", "rows.jsonl", "llm.gguf", "a.hdf", "a.joblib", "a.feather", "a.xz", "a.zst", "a.rar"),
    *("a.lmdb/data", "nohup.out", "slurm-7.out", "a.prof", "a.tflite", "a.beton", "images/1.JPG"),
    *("ray_results/a/b.json", "logs/events.out.tfevents.1", "core.123", "talk.mp4", "train-images-idx3-ubyte"),
    *("cifar-10-batches-py/data_batch_1", "cifar/train/cat/1.png", "imagenet/train/n01/a.JPEG", "a.onnx.data"),
    *("kaggle.json", "putty.ppk", "keys.gpg", "home.ovpn", "rclone.conf", ".s3cfg", ".docker/config.json"),
    *("netrc", ".my.cnf", "krb5cc_0", "spark.keytab", "hadoop.jceks", "apns.p8", "mine.age", ".secrets/s3"),
    *("client_secret_1.apps.googleusercontent.com.json", ".databrickscfg", ".vault-token"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".ci/run", ".pre-commit-config.yaml", "docs/api.md"),
)
SENT = (
    *("jobs/train.py", "dircluster/data/loader.py", "my_defense.py", "settings.yaml", "tune_spaces/mine.py"),
    *("mine/core.py", "mine/README.md", "dircluster/evaluation/html_report.html"),
)
PACKAGE = Path("/nowhere/package.zip")
"""Of what is not packed."""
PRIVATE = "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE"
ESCAPED = PRIVATE.replace("RSA ", "").replace("\n", "\\n")
HIDDEN = {
    "prod.env.txt": None,
    "deploy.md": PRIVATE,
    "settings.yaml": "aws_secret_access_key: " + 40 * "a",
    "login.py": f"token = 'ghp_{36 * 'b'}'",
    "fine.py": f"token = 'github_pat_{22 * 'b'}_{40 * 'c'}'",
    "llm.toml": f'key = "sk-{48 * "d"}"',
    "session.json": '{"id": "ASIA' + 16 * "E" + '"}',
    "maps.js": f"const key = 'AIza{35 * 'f'}';",
    "remotes.ini": "secret_access_key = " + 40 * "g",
    "camel.json": '{"secretAccessKey": "' + 40 * "h" + '"}',
    "config.json": '{"auths": {"registry": {"auth": "bWU6cGFzc3dvcmQ="}}}',
    "azure.txt": f"DefaultEndpointsProtocol=https;AccountKey={86 * 'i'}==",
    "mine.json": f'{{"username": "me", "key": "{16 * "0f"}"}}',
    "database.yaml": "uri: postgresql://me:hunter" + "2@host:5432/mlflow",
    "token.txt": None,
    "notes/api-key": None,
}
"""Files that no pattern of .rayignore names, by what they hold."""


def write(folder: Path, name: str, text: str = "x") -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    for name in (".rayignore", ".gitignore"):
        write(tmp_path, name, (root / name).read_text())
    for name in (*LEFT_OUT, *SENT):
        write(tmp_path, name)
    return tmp_path


def test_data_weights_and_secrets_stay_here(clone: Path, root: Path) -> None:
    found = {str(file.relative_to(clone)) for file in files_sent(clone)}
    assert found == {".rayignore", ".gitignore", *SENT}
    for name in (".git/objects/1f", "venv/lib/torch.so", "src/.venv/bin/python"):  # Ray itself leaves them out
        write(clone, name)
    (clone / ".rayignore").write_text("")
    assert not {file.relative_to(clone).parts[0] for file in files_sent(clone)} & {".git", "venv"}
    (clone / ".rayignore").write_text((root / ".rayignore").read_text())
    options = ["--address", "http://127.0.0.1:8265"]
    command = ["--", "python", "jobs/train.py", "--working-dir", "no flag of Ray's"]
    package = clone.parent / "package.zip"
    asked = ["--working-dir", str(clone), *options]
    assert checked([*asked, *command], package) == [*asked, "--working-dir", str(package), *command]
    with zipfile.ZipFile(package) as archive:
        assert sorted(archive.namelist()) == sorted(found)
        assert archive.read("jobs/train.py") == b"x"
    first = package.read_bytes()
    os.utime(clone / "settings.yaml", (0, 0))
    checked([*asked, *command], package)
    assert package.read_bytes() == first  # which Ray calls by its hash, and does not send again


def test_where_a_runtime_environment_may_leave_files_out_ray_packs(clone: Path, tmp_path: Path) -> None:
    asked = ["--runtime-env", "mine.yaml", "--working-dir", str(clone)]
    assert checked([*asked, "--", "python"], tmp_path / "package.zip")[-3:] == [str(clone), "--", "python"]
    assert not (tmp_path / "package.zip").exists()


@pytest.mark.parametrize("name", HIDDEN)
def test_a_secret_that_would_be_sent_is_named(name: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(clone, name, HIDDEN[name] or "x")
    monkeypatch.chdir(clone)
    with pytest.raises(ConfigError, match=rf"nothing is sent: {name} would be, and look"):
        checked(["--", "python", "jobs/train.py"], PACKAGE)
    words = ["--send-secrets", "--runtime-env=mine.yaml", "--", "python"]
    assert checked(words, PACKAGE) == ["--runtime-env=mine.yaml", "--working-dir", ".", "--", "python"]


def test_a_large_file_is_named(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--working-dir", str(clone), "--", "python", "jobs/train.py"]
    package = clone.parent / "package.zip"
    checked(words, package)
    assert "large:" not in capsys.readouterr().out
    write(clone, "tables/words.json", "1" * 2_500_000)
    checked(words, package)
    assert "large: tables/words.json (2.5 MB); name in .rayignore" in capsys.readouterr().out


SECRETS: dict[str, str | None] = {
    "secrets": None,
    "secret": None,
    "creds.json": None,
    "mlflow_creds": None,
    "mypassword.txt": None,
    "auth.json": None,
    "my-project-1a2b.json": f'{{"type": "service_account", "private_key": "{ESCAPED}"}}',
    "gcp.yaml": f'private_key: "{ESCAPED}"',
    "gcp.sh": f"export KEY=$'{ESCAPED}'",
    "twice.json": json.dumps(json.dumps({"private_key": PRIVATE})),
    "kube.yaml": "client-key-data: " + base64.b64encode(PRIVATE.encode()).decode(),
    "mine.asc": PRIVATE.replace("RSA ", "PGP ").replace("KEY", "KEY BLOCK"),
    "client.json": '{"installed": {"client_secret": "GOCSPX-' + 28 * "j" + '"}}',
    "run.sh": "MLFLOW_TRACKING_PASSWORD=correct-horse9 python jobs/train.py",
    "mine.py": 'os.environ["MLFLOW_TRACKING_PASSWORD"] = "hunter' + '2"',
    "compose.yml": "environment:\n  - POSTGRES_PASSWORD=hunter" + "2\n",
    "values.yaml": "postgres:\n  password: hunter" + "2  # of the test server\n",
    "my.cnf": "[client]\nuser=root\npassword = Secret1\r\n",
    "user.json": '{"user": "me", "password": "Secret' + '1"}',
    "minio.ini": "secret_key = minio1",
    "redis.txt": "redis://:hunter" + "2@host:6379",
    "short.txt": "https://admin:" + "pw@mlflow.example.org",
    "machines": "machine api.wandb.ai\n  login user\n  password " + 40 * "k",
    "aws.sh": "export AWS_SESSION_TOKEN=IQoJ" + 200 * "l",
    "github.yml": "token: ghr_" + 36 * "m",
    "npm.txt": "npm_" + 36 * "n",
    "pypi.txt": "pypi-AgEIcHlwaS5vcmc" + 50 * "o",
    "stripe.txt": "sk_" + "live_" + 24 * "p",
    "vault.txt": "hvs." + 90 * "q",
    "databricks.cfg": "token=dapi" + 32 * "0",
    "jwt.txt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0." + 43 * "r",
    "header.txt": "Authorization: Basic YWRtaW46cGFzc3dvcmQ=",
    "azure_sas.txt": "https://a.blob.core.windows.net/c?sv=2020&sig=" + 43 * "s" + "%3D",
    "slack.txt": "https://hooks.slack" + ".com/services/T0000/B0000/" + 24 * "t",
    "agekey.txt": "AGE-SECRET-KEY-1" + 58 * "Q",
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_looks_like_a_secret_is_found(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, SECRETS[name] or "x")
    assert secrets_among([tmp_path / name]) == [tmp_path / name]


CERTIFICATE = base64.b64encode(bytes(range(256))).decode()
HARMLESS = {
    "added_tokens.json": "{}",
    "special_tokens.json": "{}",
    "tokens.txt": "a b c",
    "reader.py": "uri = f'postgresql://{user}:{password}@{host}'\nsplit = url.split('://')[1]\nat = 'a@b'",
    "notes.txt": "s3://bucket/prefix http://127.0.0.1:8265 git@github.com:me/mine.git task-with-a-long-name-of-its-own",
    "tokenizer.json": '{"key": "value", "auth": "none"}',
    "digest.json": f'{{"sha256": "{64 * "a"}"}}',
    "special_tokens_map.json": '{"eos_token": "</s>", "pad_token": "pad", "max_tokens": 4096}',
    "chart.yaml": "password: {{ .Values.password }}\nsecretKeyRef: s3-keys\napi_key: null\npassword: str\n",
    "compose.yml": "POSTGRES_PASSWORD: ${PASSWORD}\nPOSTGRES_PASSWORD_FILE=/run/secrets/postgres\n",
    "names.py": "os.environ['A_PASSWORD'] = password\nlogin(password=given, api_key=key)\nPASSWORD = 'password'",
    "guide.md": "export A_PASSWORD=...\nexport B_PASSWORD=$MINE\n\nPassword: it comes from the environment.\n",
    "steps.yaml": "forward_pass: 100\nsingle_pass = yes\n",
    "server.crt": f"-----BEGIN CERTIFICATE-----\n{CERTIFICATE}\n-----END CERTIFICATE-----\n",
    "kube.yaml": f"certificate-authority-data: {base64.b64encode(b'-----BEGIN CERTIFICATE-----').decode()}",
    "keys.py": "HEADER = '-----BEGIN RSA PRIVATE " + "KEY-----'",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_secret_is_sent(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, HARMLESS[name])
    assert secrets_among([tmp_path / name]) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_text_in_two_bytes_a_character_is_read(encoding: str, tmp_path: Path) -> None:
    for name, text in (("a.txt", "AWS_SECRET_ACCESS_KEY=" + 40 * "a"), ("b.txt", "my@b.de, in two bytes")):
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert secrets_among(tmp_path / name for name in ("a.txt", "b.txt")) == [tmp_path / "a.txt"]


PARTS = ("jobs", "dircluster", "tune_spaces", "pyproject.toml", "README.md", "LICENSE", ".rayignore", ".gitignore")
"""What of a checkout a job imports, or may be installed from."""


def test_a_checkout_holds_nothing_that_looks_like_a_secret_and_is_small(root: Path, tmp_path: Path) -> None:
    files = [file for file in files_sent(root) if file.relative_to(root).parts[0] in PARTS]
    assert secrets_among(files) == []
    assert large_among(files) == []
    sizes = {file: file.stat().st_size for file in files}  # Ray by itself packs without compression
    assert sum(sizes.values()) < 2_000_000
    assert sum(size for file, size in sizes.items() if file.suffix != ".py") < 500_000
    pack(files, root, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < 1_000_000


def test_large_files_are_found_the_largest_first(tmp_path: Path) -> None:
    for name, size in (("a", 2 << 20), ("b", 1 << 20), ("c", 3 << 20)):
        write(tmp_path, name, size * "x")
    assert large_among(tmp_path / name for name in "abc") == [tmp_path / "c", tmp_path / "a"]


@pytest.mark.parametrize("end", [[], ["--"]])
def test_a_command_that_is_missing(end: list[str]) -> None:
    with pytest.raises(ConfigError, match="the command is missing"):
        checked(["--address", "http://127.0.0.1:8265", *end], PACKAGE)


@pytest.mark.parametrize("name", ["a.txt", b"\xff.txt".decode(errors="surrogateescape")])
def test_what_cannot_be_packed_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "there"
    write(folder, name)

    def vanished(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "a.txt")

    if name == "a.txt":
        monkeypatch.setattr(zipfile.ZipFile, "writestr", vanished)
    with pytest.raises(ConfigError, match=r"^--working-dir .*there cannot be packed: \S.*$"):
        checked(["--working-dir", str(folder), "--", "python"], tmp_path / "package.zip")


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Handlers as they were, afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_end_that_comes_while_ray_starts_is_passed_on(own_signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def slow(command: list[str]) -> subprocess.Popen[bytes]:
        process = start(command)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", slow)
    assert submit._run(["sleep", "60"]) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("ignored", "code"), [(True, 7), (False, 128 + signal.SIGHUP)])
def test_a_terminal_that_is_closed_ends_no_submission_under_nohup(ignored: bool, code: int, own_signals: None) -> None:
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert submit._run(["sh", "-c", "kill -HUP $$; exit 7"]) == code


def test_ray_that_is_not_there_is_one_line(own_signals: None) -> None:
    with pytest.raises(ConfigError, match=r"^/nowhere/ray cannot be started: No such file"):
        submit._run(["/nowhere/ray"])


def test_ray_takes_the_locked_dependencies_as_a_runtime_environment(root: Path) -> None:
    from ray._private.runtime_env.validation import parse_and_validate_uv

    lock = root / "requirements.lock"
    assert "\n".join(parse_and_validate_uv(str(lock))["packages"]) == lock.read_text().strip()
