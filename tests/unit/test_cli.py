"""The command line: preset < file < flags, errors of one line, and no heavy import on the way."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dircluster import cli
from dircluster.cluster.commands import evaluate
from dircluster.config import ConfigError, flatten, to_dict, varied
from dircluster.presets import PRESETS, RUNS, preset
from dircluster.settings_file import as_words


def parse(*words: str) -> cli.TrainJob:
    return cli.parse(cli.TrainJob, words)


def test_flags_beat_the_file_which_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 4\nmasking: {ratio: 3/10}\ndata: {flip: true}\ndir: {alpha: 1, optimizer: {clip: null}}\n")
    run = parse("digits", "--config", str(file), "--dir.alpha", "3").run
    assert (run.seed, run.masking.ratio, run.data.flip) == (4, 0.3, True)
    assert (run.dir.alpha, run.dir.optimizer.clip) == (3.0, None)
    assert run.target == preset("digits").target


def test_no_words_are_the_digits() -> None:
    assert parse().run == preset("digits")


def test_both_forms_of_config_are_read(tmp_path: Path) -> None:
    file = tmp_path / "seven.yaml"
    file.write_text("seed: 7\n")
    assert parse("--config", str(file)).run.seed == parse(f"--config={file}").run.seed == 7


def test_fractions() -> None:
    assert parse("--attack.epsilon", "8/255").run.attack.epsilon == 8 / 255
    assert parse("--attack.epsilon=8/255").run.attack.epsilon == 8 / 255


@pytest.mark.long
@pytest.mark.parametrize("name", ["digits", "svhn"])
@pytest.mark.parametrize("flag", ["--data.name", "--name", "--tracking.experiment", "--storage.uri", "--target.uri"])
def test_the_name_of_a_preset_is_a_value_like_any_other(flag: str, name: str) -> None:
    without, after = parse(flag, name), parse("cifar10", flag, name)
    assert (without.preset, after.preset) == ("digits", "cifar10")
    for job, usual in ((without, preset("digits")), (after, preset("cifar10"))):
        assert cli.describe(job) == ({flag[2:]: name} if name != flatten(to_dict(usual))[flag[2:]] else {})


def test_a_fraction_is_a_number_where_a_number_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("storage: {uri: 1/2}\nmasking: {ratio: 3/10}\n")
    words = ("--tracking.experiment", "2024/11", "--storage.uri=1/2", "--summary", "3/4", "--dir.alpha", "1/2")
    for job in (parse(*words), parse("--config", str(file), *words[:2], *words[3:])):
        assert (job.run.tracking.experiment, job.run.storage.uri, str(job.summary)) == ("2024/11", "1/2", "3/4")
        assert job.run.dir.alpha == 0.5
    again = [word for name, value in cli.describe(job).items() for word in as_words(name, value)]
    assert parse(*again).run == job.run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["", "--seed", "3"], "the preset is empty: give a value, or leave it out"),
        (["digits", "--config", ""], "--config is empty"),
        (["digits", "--config="], "--config is empty"),
        (["digits", "--data.uri", " "], "--data.uri is empty"),
        (["digits", "--export", "", "--seed", "3"], "--export is empty"),
        (["digits", "--config", "a.yaml", "--config=b.yaml"], "--config is given twice"),
        (["digits", "--config=-a.yaml"], "--config -a.yaml begins as a flag does: give ./-a.yaml"),
    ],
)
def test_what_a_shell_left_empty_or_a_file_that_is_not_read_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(*words)


def test_steps_follow_the_radius_unless_they_are_given(tmp_path: Path) -> None:
    """Half of the radius stays half of it; in another norm the step is what it is by itself."""
    half = parse("digits", "--attack.epsilon", "1/10").run
    assert half.attack.step == half.dir.perturb_step_size == pytest.approx(0.05)
    assert parse("cifar10_small", "--attack.epsilon", "1/255").run.attack.step == pytest.approx(0.5 / 255)
    euclidean = parse("digits", "--attack.norm", "l2", "--attack.epsilon", "1").run
    assert (euclidean.attack.training_step_size, euclidean.dir.perturb_step_size) == (None, None)
    assert euclidean.attack.step == pytest.approx(2.5 / 3)
    given = parse("digits", "--attack.epsilon", "1/10", "--attack.training-step-size", "0.075").run
    assert (given.attack.step, given.dir.perturb_step_size) == (0.075, pytest.approx(0.05))
    file = tmp_path / "mine.yaml"
    file.write_text("attack: {epsilon: 1/10}\ndir: {perturb_step_size: 0.075}\n")
    assert parse("digits", "--config", str(file)).run == replace(half, dir=replace(half.dir, perturb_step_size=0.075))
    file.write_text(cli.to_yaml(given))
    assert parse("digits", "--config", str(file)).run == given
    paper = parse("cifar10", "--attack.epsilon", "4/255").run.attack
    assert (paper.training_step_size, paper.step) == (None, pytest.approx(1 / 255))


@pytest.mark.parametrize(
    "words",
    [
        ("--attack.epsilon", "1/5", "--attack.training-step-size", "0.075"),  # the preset's own, which does not follow
        ("--attack.epsilon", "1/5"),
        ("--attack.norm", "l2", "--attack.epsilon", "1", "--dir.perturb-step-size", "0.075"),
    ],
)
def test_the_command_of_a_job_is_that_job(words: tuple[str, ...]) -> None:
    job = parse("digits", *words)
    assert parse(*shlex.split(cli.command(job))[2:]).run == job.run


def test_a_sweep_over_the_radius_takes_the_steps_along() -> None:
    run = preset("digits")
    assert varied(run, {"attack.epsilon": 0.3}).attack.step == pytest.approx(0.15)
    both = varied(run, {"attack.epsilon": 0.3, "attack.training_step_size": 0.1})
    assert both.attack.step == 0.1
    given = parse("digits", "--attack.training-step-size", "0.02")
    kept = varied(given.run, {"attack.epsilon": 0.3}, given.given_settings)
    assert (kept.attack.step, kept.dir.perturb_step_size) == (0.02, pytest.approx(0.15))
    assert varied(run, {"dir.alpha": 0.0}).attack == run.attack


def test_what_is_given_is_known_from_the_file_and_from_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("scaling: {workers: 1}\ndir: {optimizer: {lr: 0.1}}\n")
    words = ("--config", str(file), "--seed", "0", "--data.no-flip", "--tracking.log_every=3")
    assert parse("digits", *words).given == {
        *("config", "scaling.workers", "dir.optimizer.lr", "seed", "data.no-flip", "tracking.log-every")
    }
    assert parse("digits").given == frozenset()


@pytest.mark.parametrize(
    ("words", "settings", "workers"),
    [
        ([], "seed: 1", None),
        ([], "scaling: {workers: 2}", 2),
        ([], "scaling: {workers: 1}", 1),
        (["--scaling.workers", "3"], "scaling: {workers: 2}", 3),
        (["--scaling.workers=1:4"], "seed: 1", 4),
    ],
)
def test_an_evaluation_takes_the_workers_of_the_file_too(
    words: list[str], settings: str, workers: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(evaluate._Judging, "run", lambda self: seen.append(self.workers) or 0)
    file = tmp_path / "mine.yaml"
    file.write_text(settings)
    assert evaluate.main(["digits_smoke", "--defense", "none", "--config", str(file), *words]) == 0
    assert seen == [workers]


@pytest.mark.parametrize(
    ("words", "file", "asked"),
    [
        (["--suite", "quick"], False, False),
        (["--suite", "quick", "--verdict"], False, True),
        (["--suite", "quick"], True, True),
        (["--suite", "paper"], False, True),
        (["--suite", "paper", "--no-verdict"], True, False),
        (["--suite", "paper", "--evaluation.no-verdict"], False, False),
    ],
)
def test_flags_about_the_verdict_beat_the_file(
    words: list[str], file: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(evaluate._Judging, "run", lambda self: seen.append(self.config.evaluation.verdict) or 0)
    of_file = ["--evaluation.verdict"] if file else []
    assert evaluate.main(["digits_smoke", "--defense", "none", *of_file, *words]) == 0
    assert seen == [asked]


@pytest.mark.parametrize(
    "words", [["--verdict"], ["--suite", "paper"], ["--suite", "autoattack"], ["--suite", "rigorous", "--no-verdict"]]
)
def test_printed_settings_are_judged_by_as_what_printed_them(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(evaluate._Judging, "run", lambda self: seen.append(self.config.evaluation) or 0)
    judged = ["digits_smoke", "--defense", "none"]
    assert evaluate.main([*judged, *words, "--print-config"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert evaluate.main([*judged, *words]) == evaluate.main([*judged, "--config", str(file)]) == 0
    assert seen[0] == seen[1] != preset("digits_smoke").evaluation


@pytest.mark.parametrize(
    "words",
    [
        "jobs/train.py digits_smoke --help",
        "jobs/train.py digits_smoke --print-config",
        "jobs/leaderboard.py --help",
        "jobs/submit.py --help",
        "jobs/replay.py docs/claims/digits-at.json 1",
        "-m dircluster",
    ],
)
def test_who_reads_what_is_printed_may_leave_before_its_end(root: Path, words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = ["bash", "-c", f"{sys.executable} {words}; exit $?"]
    with open(writer, "wb") as left:
        done = subprocess.run(command, stdout=left, stderr=subprocess.PIPE, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("digtis", 2, "error: unknown preset 'digtis'; did you mean digits"),
        ("digits --print-config", 1, "error: what is printed cannot be written: No space left on device"),
        ("--help", 1, "error: what is printed cannot be written: No space left on device"),
    ],
)
def test_a_full_disk_under_what_is_printed_is_one_line(root: Path, words: str, code: int, said: str) -> None:
    command = f"{sys.executable} jobs/train.py {words} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=root)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


def test_a_job_needs_no_standard_output(root: Path) -> None:
    command = f"{sys.executable} jobs/train.py digits_smoke --print-config >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")


LAST = {preset(name).defense: name for name in PRESETS}
"""A preset of each defense: reading settings takes a fifth of a second."""


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).defense == "dir" or name in LAST.values()])
def test_printed_settings_can_be_read_back(name: str, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(cli.to_yaml(preset(name)))
    first = next(other for other in PRESETS if preset(other).defense == preset(name).defense)
    assert parse(first, "--config", str(file)).run == preset(name)


def test_the_names_that_others_script_against() -> None:
    words = "cifar10 --seed 1 --launcher local --summary s.json --fresh --storage.uri a --data.uri b --target.uri c"
    knobs = "--masking.ratio 0.3 --model.patch 4 --model.encoder-depth 4 --model.decoder-depth 1 --attack.epsilon 4/255"
    job = parse(*words.split(), *knobs.split(), "--dir.alpha", "1", "--scaling.workers", "2")
    assert (job.launcher, job.fresh, job.run.data.uri, job.run.target.uri) == ("local", True, "b", "c")
    assert (job.run.model.encoder_depth, job.run.model.decoder_depth, job.run.scaling.workers) == (4, 1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("xyz", "unknown preset 'xyz'; there are digits, cifar10"),
        ("digtis", "unknown preset 'digtis'; did you mean digits"),
        ("--masking.ratio 50", "masking.ratio must lie in (0, 1), got 50; did you mean 0.5?"),
        ("--masking.ratoi 0.3", "--masking.ratio"),
        ("--model.encoder-depth deep", "--model.encoder-depth"),
        ("--launcher slurm", "invalid choice 'slurm'"),
        ("--seed", "Missing value for argument '--seed'"),
        ("--config /nowhere.yaml", "--config /nowhere.yaml cannot be read"),
        ("digits svhn", "the preset is the first word alone, got 'svhn' after it (the preset is digits)"),
        ("--seed 3 svhn", "the preset is the first word alone, got 'svhn' after it (the preset is digits)"),
        ("--tracking.experiment digits cifar10", "got 'cifar10' after it"),
        ("digits --data.flip true", "--data.flip takes no value, got 'true': it is --data.flip or --data.no-flip"),
        ("digits --data.flip=true", "--data.flip takes no value, got 'true'"),
        ("digits --data.no_flip 1", "--data.flip takes no value, got '1'"),
        ("digits --fresh yes --seed 1", "--fresh takes no value, got 'yes': it is --fresh"),
        ("--fresh svhn", "the preset is the first word alone, got 'svhn' after it"),
    ],
)
def test_errors_are_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(*words.split())
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold settings"):
        parse("--config", str(file))
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        parse("--config", str(file))


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("--masking.ratio 50", 2), ("--print-config", 0)])
def test_help_and_errors_import_nothing_heavy(words: str, code: int, root: Path) -> None:
    script = (
        "import sys; from dircluster.cluster.commands.train import main\n"
        f"try: code = main({words.split()!r})\n"
        "except SystemExit as ended: code = ended.code or 0\n"
        "print(code, sorted({'torch', 'ray', 'mlflow', 'timm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stderr.splitlines()[-1] == f"{code} []"


def test_what_a_job_changes_can_be_typed_again() -> None:
    job = parse("digits", "--dir.alpha", "1", "--data.flip", "--dir.optimizer.milestones", "3", "4")
    words = [word for name, value in cli.describe(job).items() for word in as_words(name, value)]
    assert parse("digits", *words).run == job.run


LAUGHS = "a0: &a0 {0}{2}x, {3}x{1}\n" + "".join(
    f"a{line}: &a{line} {{0}}{', '.join(f'{{{place}}}*a{line - 1}' for place in range(2, 12))}{{1}}\n"
    for line in range(1, 9)
)
"""Nine lines of lists, or of maps, that are a billion values; to be formatted with brackets and ten names."""


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("scaling: {workers: 1:4}", "scaling.workers", "1:4"),
        ("scaling: {workers: 08}", "scaling.workers", 8),
        ("training: {capture: on, fused: off}", "training.capture", "on"),
        ("data: {flip: on}", "data.flip", True),
        ("data: {flip: no}", "data.flip", False),
        ("data: {flip: True}", "data.flip", True),
        ("target: {optimizer: {lr: 1e-3}}", "target.optimizer.lr", 1e-3),
        ("target: {optimizer: {lr: 1.e-3, warmup_epochs: 08}}", "target.optimizer.warmup_epochs", 8),
        ("tracking: {experiment: 2026-11-26}", "tracking.experiment", "2026-11-26"),
        ("tracking: {experiment: yes}", "tracking.experiment", "yes"),
        ("dir: {epochs: 010}", "dir.epochs", 10),
        ("training.microbatch: ~", "training.microbatch", None),
        ("attack: {epsilon: 1/10}", "attack.epsilon", 0.1),
        ("data: {flip: 'true'}", "data.flip", True),
        ("data: {flip: Off}", "data.flip", False),
        ("data: {flip: y}", None, "data.flip must be true or false, got 'y'"),
        ("data: {flip: 1}", None, "data.flip must be true or false, got '1'"),
        ("data: {flip: }", None, "data.flip must be true or false, got null"),
        ("fresh: false", "seed", 0),
        ("storage: {uri: ~}", None, "storage.uri must have a value, got null: give one, or leave the line out"),
        ("name: null", None, "name must have a value, got null"),
        ("seed:", None, "seed must have a value, got null"),
        ("data: {uri: null}", "data.uri", None),
        ("training: {compile: false}", "training.compile", "off"),  # as it once was printed
        ("training: {fused: true}", "training.fused", "on"),
        ("dir:", None, "dir is a section without settings"),
        ("seed: 1\nname: a\nseed: 2", None, "seed is given in line 1 and again in line 3: leave one out"),
        ("dir: {alpha: 1}\ndir: {epochs: 3}", None, "dir is given in line 1 and again in line 2"),
        ("dir: {alpha: 1}\ndir.alpha: 2", None, "dir.alpha is given in line 1 and again in line 2"),
        ("data: {held_out: 0.1,\n  held-out: 0.2}", None, "data.held_out is given in line 1 and again in line 2"),
        ("data: {flip: true, no-flip: true}", None, "data.flip is given in line 1 and again in line 1"),
        ("data.no_flip: true\ndata: {flip: true}", None, "data.flip is given in line 1 and again in line 2"),
        ("data: {no-flip: true}", "data.flip", False),
        ("data: {uri: 'None'}", None, "data.uri cannot be the text None: write null for no value"),
        ("tracking: {experiment: None}", "tracking.experiment", "None"),
        ("data: {no-flip: false}", "data.flip", True),
        ("data: {no_flip: digits}", None, "data.no_flip must be true or false, got 'digits'"),
        ("data.no_flip:", None, "data.no_flip must be true or false, got null"),
        ("dir: {optimizer: {milestones: true}}", None, "valid parse for arguments: ['true']"),
        ("tracking: {experiment: True}", "tracking.experiment", "True"),
        ("training: {fused: TRUE}", "training.fused", "on"),
        ("seed: false", None, "--seed: invalid literal for int() with base 10: 'false'"),
        ("seed: [3, digits]", None, "seed takes one value, got a list of 2"),
        ("scaling: {workers: [1, 4]}", None, "scaling.workers takes one value, got a list of 2"),
        ("target: {mean: [1/2], std: [1/4]}", "target.std", [0.25]),
        ("dir: {optimizer: {milestones: [3, 4]}}", "dir.optimizer.milestones", [3, 4]),
        ("data: {uri: !!binary aGFsbG8=}", None, "line 1 has a tag, tag:yaml.org,2002:binary"),
        ("seed: 1\nname: !x y", None, "line 2 has a tag, !x: write the value without it"),
        ("data: {uri: ''}", None, "--data.uri is empty: give a value, or leave it out"),
        ("<<: {seed: 3}", None, "'<<.seed' is no name of a setting"),
        ("\u00a0seed: 3", None, "'\\xa0seed' is no name of a setting"),
        ("seed: 1\ndata:\n\tflip: true", None, "found character '\\t' that cannot start any token in line 3"),
        ("seed: 1\n---\nseed: 2", None, "single document in the stream but found another document in line 2"),
        ("{}", None, "it must hold settings, one a line, got nothing"),
        ("config: other.yaml\nseed: 3", None, "config is no setting: give --config on the command line"),
        ("help: true", None, "help is no setting"),
        ("dir: {optimizer: {milestones: [75, --seed=4]}}", None, "milestones cannot hold '--seed=4', which begins as"),
        ("dir: {optimizer: {milestones: [--fresh]}}", None, "dir.optimizer.milestones cannot hold '--fresh'"),
        ("dir: {optimizer: {milestones: -h}}", None, "dir.optimizer.milestones cannot hold '-h'"),
        ("data: {uri: -x}", None, "data.uri cannot hold '-x', which begins as a flag does"),
        ("tracking: {experiment: -1}", "tracking.experiment", "-1"),
        ("target: {optimizer: {lr: 1e-400}}", None, "target.optimizer.lr must be positive, got 0.0"),
        ("attack: {epsilon: -.5}", None, "attack.epsilon must lie in (0, 1), got -0.5"),
        ("seed: {}", None, "seed has nothing in it: give a value or settings, or leave the line out"),
        ("data: {flip: {}}", None, "data.flip has nothing in it"),
        ("data: {}", None, "data has nothing in it"),
        ("a: &a\n  b: *a", None, "line 2 refers to another by *a: write it out"),
        (LAUGHS.format("[", "]", *[""] * 10), None, "line 2 refers to another by *a0"),
        (LAUGHS.format("{", "}", *(f"k{index}: " for index in range(10))), None, "line 2 refers to another by *a0"),
        ("\n".join(f"k{index}: 1" for index in range(600)), None, "it holds 1200 names and values, more than the 1000"),
        ("\n".join(f"k{index}: 1" for index in range(20_000)), None, "it is longer than 65536 characters"),
        ("[" * 3000, None, "nests too deep"),
        ("model: {width: 1000000000000000000}", None, "model.width is too large, got 1000000000000000000"),
        ("data: {limit: 99999999999}", None, "data.limit is too large"),
        ('target: {uri: "a\\0b"}', None, "holds a NUL character"),
        ('defense: "\\0"', None, "holds a NUL character"),
    ],
)
def test_a_file_means_what_it_looks_like(tmp_path: Path, line: str, name: str | None, value: object) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(line)
    if name is None:
        with pytest.raises(ConfigError, match=re.escape(str(value))) as refusal:
            parse("digits", "--config", str(file))
        assert "\n" not in str(refusal.value)
    else:
        assert flatten(to_dict(parse("digits", "--config", str(file)).run))[name] == value


@pytest.mark.parametrize(
    ("own", "found"), [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]
)
def test_threads_of_a_job_spin_briefly_unless_somebody_said_otherwise(
    own: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    seen: list[str | None] = []
    assert cli.execute(cli.TrainJob, ["digits"], lambda job: seen.append(os.environ.get("GOMP_SPINCOUNT")) or 0) == 0
    assert seen == [found]
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


@pytest.mark.parametrize(
    ("words", "workers"),
    [([], "1"), (["--scaling.workers", "1:2"], "1"), (["--scaling.workers", "1:3"], "1:3"), (["--seed", "1"], "1")],
)
def test_trials_and_systems_take_the_fewest_workers_of_their_preset(words: list[str], workers: str) -> None:
    job = cli.parse(cli.TuneJob, ["digits", *words])
    assert ":" in str(job.run.scaling.workers)
    assert str(cli.with_fewest_workers(job).run.scaling.workers) == workers


def test_help_ends_in_a_terminal_of_one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit) as ended:
        cli.parse(cli.TrainJob, ["digits_smoke", "--help"])
    assert (ended.value.code, os.environ["COLUMNS"]) == (0, "1")


def test_help_names_all_defenses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(cli.TrainJob, ["digits_smoke", "--help"])
    text = capsys.readouterr().out.partition("--defense")[2].partition("--launcher")[0]
    assert set(RUNS) <= set(re.findall(r"\w+", text))


def test_the_command_that_goes_on_with_a_sweep_is_that_sweep_s() -> None:
    words = ["digits", "--dir.alpha", "1.0", "--space", "my own.py", "--search", "--points", "3", "--seeds", "2"]
    job = cli.parse(cli.TuneJob, [*words, "--max-concurrent", "2"])
    found = cli.command(job, "tune")
    assert found == "python jobs/tune.py digits --dir.alpha 1.0 --space 'my own.py' --search --points 3 --seeds 2" + (
        " --max-concurrent 2"
    )
    again = cli.parse(cli.TuneJob, shlex.split(found)[2:])
    assert dataclasses.replace(again, given=job.given) == job


def test_the_command_that_resumes_writes_the_files_that_were_asked_for() -> None:
    job = parse("digits", "--summary", "my outcome.json", "--export", "out")
    found = cli.continued(cli.command(job), job)
    assert found == "python jobs/train.py digits --export out --summary 'my outcome.json'"
    assert parse(*shlex.split(found)[2:]) == job
    plain = parse("digits", "--seed", "3")
    assert cli.continued(cli.command(plain), plain) == "python jobs/train.py digits --seed 3"
    reproduction = cli.parse(cli.ReproduceJob, ["digits", "--what", "table1", "--summary", "out.json"])
    assert cli.continued("again", reproduction) == "again --summary out.json"


def test_the_command_that_judges_trusts_a_target_of_ones_own() -> None:
    own = parse("digits", "--target.architecture", "ours:make")
    judge = "python jobs/evaluate.py digits"
    assert cli.command(own, "evaluate") == f"{judge} --trust-code --target.architecture ours:make"
    assert "--trust-code" not in cli.command(own)
    for words in (("--target.architecture", "timm:test_vit"), ("--target.uri", "timm:test_vit")):
        assert cli.command(parse("digits", *words), "evaluate") == f"{judge} {' '.join(words)}"
