"""The jobs as one command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dircluster import cli
from dircluster.__main__ import VERBS, main
from tests.jobs import run_job, start_job


def test_it_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_its_job(verb: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (root / "jobs" / f"{verb}.py").is_file()
    what = ["table1"] if verb == "reproduce" else []
    with pytest.raises(SystemExit) as ended:
        main([verb, *what, "digits", "--help"])
    assert ended.value.code == 0
    what_it_does = getattr(cli, f"{verb.title()}Job").__doc__.splitlines()[0]
    assert what_it_does in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("called", [["-m", "dircluster"], ["jobs/train.py"]], ids=["verb", "job"])
def test_help_calls_a_command_as_its_user_does(called: list[str], root: Path) -> None:
    words = [*called, "train", "--help"] if called[0] == "-m" else [*called, "--help"]
    shown = subprocess.run([sys.executable, *words], cwd=root, check=True, capture_output=True, text=True).stdout
    assert shown.split("[", 1)[0].split() == ["usage:", *(["dircluster", "train"] if "-m" in called else called)]


def test_another_word_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "digits"]) == 2
    assert capsys.readouterr().err == f"error: there is no verb 'judge'; there are {', '.join(VERBS)}\n"


def test_help_answers_without_torch(root: Path) -> None:
    code = "import sys; from dircluster.__main__ import main; main(['-h']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_ctrl_c_before_a_job_listens_ends_it_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    done = run_job("train", "--defense", "interrupted", folder=tmp_path)
    assert (done.code, done.out, done.err) == (130, "", "")


def test_what_a_terminal_has_no_characters_for_is_shown_in_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('d\\u00fcnn')\n")
    done = start_job("train", "--defense", "mine", folder=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.out, len(done.error)) == (2, "d\\xfcnn\n", 1)
