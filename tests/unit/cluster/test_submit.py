"""What travels with a job: a clone without data and secrets, and a line where a secret would."""

from __future__ import annotations

from pathlib import Path

import pytest

from dircluster.cluster.commands.submit import checked
from dircluster.cluster.runtime.upload import files_sent
from dircluster.cluster.working_dir import secrets_among
from dircluster.config import ConfigError

LEFT_OUT = (
    *(".env", ".env.local", "prod.env", "a/key.pem", "a/b/server.key", "id_rsa", ".netrc", "aws-credentials.csv"),
    *("my-service-account.json", "infra/auth_token", "terraform.tfstate", ".aws/config", ".ssh/known_hosts"),
    *("big.parquet", "data/train/0.png", "weights.safetensors", "net.pt", "a/last.ckpt", "wandb/run-1/x", "mlruns/0/m"),
    *("notes/.ipynb_checkpoints/a-checkpoint.ipynb", "notes/a.ipynb", "runs/mlflow.db", "cifar-10-python.tar.gz"),
)
SENT = ("jobs/train.py", "dircluster/data/loader.py", "my_defense.py", "settings.yaml", "tune_spaces/mine.py")
PRIVATE = "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE"
HIDDEN = {
    "prod.env.txt": None,
    "deploy.md": PRIVATE,
    "settings.yaml": "aws_secret_access_key: " + 40 * "a",
    "login.py": f"token = 'ghp_{36 * 'b'}'",
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


def test_data_weights_and_secrets_stay_here(clone: Path) -> None:
    found = {str(file.relative_to(clone)) for file in files_sent(clone)}
    assert found == {".rayignore", ".gitignore", *SENT}
    options = ["--address", "http://127.0.0.1:8265"]
    command = ["--", "python", "jobs/train.py", "--working-dir", "no flag of Ray's"]
    asked = ["--working-dir", str(clone), *options, *command]
    assert checked(asked) == asked


@pytest.mark.parametrize("name", HIDDEN)
def test_a_secret_that_would_be_sent_is_named(name: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(clone, name, HIDDEN[name] or "x")
    monkeypatch.chdir(clone)
    with pytest.raises(ConfigError, match=rf"nothing is sent: {name} would be, and look"):
        checked(["--", "python", "jobs/train.py"])
    assert checked(["--send-secrets", "--", "python"]) == ["--working-dir", ".", "--", "python"]


def test_a_checkout_holds_nothing_that_looks_like_a_secret_and_is_small(root: Path) -> None:
    files = [root / name for name in ("jobs", "dircluster", "tune_spaces", "pyproject.toml", "README.md")]
    assert secrets_among(file for place in files for file in (place, *place.rglob("*")) if file.is_file()) == []


def test_a_command_that_is_missing() -> None:
    with pytest.raises(ConfigError, match="the command is missing"):
        checked(["--address", "http://127.0.0.1:8265"])


def test_ray_takes_the_locked_dependencies_as_a_runtime_environment(root: Path) -> None:
    from ray._private.runtime_env.validation import parse_and_validate_uv

    lock = root / "requirements.lock"
    assert "\n".join(parse_and_validate_uv(str(lock))["packages"]) == lock.read_text().strip()
