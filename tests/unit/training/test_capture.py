"""Captured steps: what is recorded when, on which tensors, and that a broken loss still changes no weight.

There is no CUDA graph on a CPU: the recorder here does the recorded work again, on the tensors that it was recorded on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster.config import ConfigError
from dircluster.defenses.recipe import Batch
from dircluster.distributed.parallel import Parallel
from dircluster.presets import preset
from dircluster.presets.dir import DirRun
from dircluster.training.capture import WARM_UP, CapturedStep, GraphRecorder, captured_step
from dircluster.training.interrupt import Interrupted
from dircluster.training.protocols import NoTracker, Quiet
from dircluster.training.run import Run
from dircluster.training.step import NonFiniteLoss
from dircluster.training.switches import check_switches
from dircluster.training.trainer import Trainer
from tests.conftest import ALONE
from tests.unit.training.conftest import BATCH_NORMED, Hears, StopAfter, make_trainer
from tests.unit.training.test_updates import Game

CPU = torch.device("cpu")


class Again:
    """Does recorded work again."""

    def __init__(self, error: Exception | None = None) -> None:
        self.warmed = self.recorded = self.replayed = 0
        self.error = error

    def warm_up(self, work: Callable[[], None]) -> None:
        self.warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        if self.error is not None:
            raise self.error

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture
def whole(smoke: DirRun) -> DirRun:
    """A run whose batches pass whole, by optimizers that guard the weights."""
    training = dataclasses.replace(smoke.training, microbatch=None, fused="on", capture="on")
    return dataclasses.replace(smoke, training=training)


def uncaptured(run: DirRun) -> DirRun:
    return dataclasses.replace(run, training=dataclasses.replace(run.training, capture="off"))


@pytest.mark.parametrize("stage", ["target", "pretrain", "dir"])
def test_captured_steps_are_the_steps(whole: DirRun, tmp_path: Path, stage: str) -> None:
    recorder = Again()
    plain = make_trainer(uncaptured(whole), tmp_path / "plain", stage=stage)
    made = make_trainer(whole, tmp_path / "made", recorder, stage)
    assert (plain.captured is None, made.captured is None) == (True, False)
    before = {k: v.clone() for k, v in made.recipe.state_dict().items()}
    phases: list[str] = []
    made.passed = phases.append
    for step in range(6):
        assert made.step(step)[0] == plain.step(step)[0]
        if step == 0:
            gradients = {n: p.grad for n, p in made.parameters.items()}
            assert None not in gradients.values()
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (WARM_UP, 1, 6 - WARM_UP)
    assert phases[:3] == ["draws", "replay", "update"]
    assert set(phases) == set(phases[:3])
    assert all(p.grad is gradients[n] for n, p in made.parameters.items())  # never dropped: a graph adds to these
    state = plain.recipe.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in made.recipe.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in made.recipe.state_dict().items())


def test_inputs_are_copied_into_the_tensors_that_were_recorded() -> None:
    seen: list[list[int]] = []
    weight = torch.zeros(2, requires_grad=True)

    def work(batch: Batch) -> tuple[tuple[str, ...], Tensor]:
        seen.append([t.data_ptr() for t in (batch.images, batch.labels, batch.draws["a"], batch.draws["b"])])
        total = batch.images.sum() + batch.labels.sum() + 10 * batch.draws["a"].sum() + 100 * batch.draws["b"].sum()
        (weight.sum() * total).backward()  # type: ignore[no-untyped-call]
        return ("loss",), total.detach().double()[None]

    settled: list[int] = []
    captured = CapturedStep(work, [weight], Again(), lambda: settled.append(len(seen)))
    values = []
    for i in range(WARM_UP + 3):
        draws = {"b": torch.full((1,), i + 2.0), "a": torch.full((1,), i + 1.0)}
        draws = draws if i % 2 else dict(reversed(draws.items()))  # names count, not their order
        batch = Batch(torch.full((1, 1, 1, 1), float(i)), torch.tensor([i]), draws)
        _, value = captured(batch)
        assert weight.grad is not None
        assert weight.grad.tolist() == [value.item()] * 2  # zeroed before each
        values.append(value)
    assert [v.item() for v in values] == [2 * i + 10 * (i + 1) + 100 * (i + 2) for i in range(WARM_UP + 3)]
    assert settled == [WARM_UP]
    assert len({tuple(pointers) for pointers in seen[WARM_UP:]}) == 1


def test_a_captured_run_resumes_and_ends_in_the_bits_of_one_that_is_not(whole: DirRun, tmp_path: Path) -> None:
    """Over held-out selection, a running mean, checkpoints and a target with batch statistics."""
    target = dataclasses.replace(whole.target, architecture=BATCH_NORMED, ema=0.9, epochs=4)
    run = dataclasses.replace(whole, target=target, tracking=dataclasses.replace(whole.tracking, log_every=2))
    plain = make_trainer(uncaptured(run), tmp_path / "plain", stage="target")
    plain.run()
    stops, recorder = 0, Again()
    while True:
        made = make_trainer(run, tmp_path / "made", recorder, "target", StopAfter(3))
        try:
            made.run()
            break
        except Interrupted:
            stops += 1
            assert made.captured is None  # a graph's memory is given back
    assert stops > 1
    assert recorder.recorded > 0
    state = plain.recipe.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in made.recipe.state_dict().items())
    assert plain.mean.tensors
    assert all(torch.equal(v, made.mean.tensors[k]) for k, v in plain.mean.tensors.items())


def poisoned(made: Trainer, at: int) -> list[int]:
    """Let the loss of the ``at``-th pass be infinite; -> the passes, as they come."""
    inner, passes = made.recipe.forward, []

    def forward(batch: Batch, update: int = 0) -> dict[str, Tensor]:
        terms = inner(batch, update)
        passes.append(len(passes))
        return {k: v * torch.inf for k, v in terms.items()} if len(passes) == at else terms

    made.recipe.forward = forward  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("capture", ["on", "off"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_broken_loss_changes_no_weight_also_where_nobody_waits_to_read_it(
    whole: DirRun, tmp_path: Path, at: int, capture: Any, name: Any
) -> None:
    optimizer = dataclasses.replace(whole.dir.optimizer, name=name, clip=1.0)
    run = dataclasses.replace(whole, dir=dataclasses.replace(whole.dir, optimizer=optimizer))
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, capture=capture))
    made = make_trainer(run, tmp_path, Again())
    poisoned(made, at)
    for step in range(at - 1):
        made._step(step)
    before = {k: v.clone() for k, v in made.recipe.state_dict().items()}
    momenta = {k: {n: v.clone() for n, v in s.items()} for o in made.optimizers.values() for k, s in o.state.items()}
    with pytest.raises(NonFiniteLoss, match=f"dir: adversarial, representation is not finite at step {at};"):
        made.step(at - 1)
    assert all(torch.equal(v, before[k]) for k, v in made.recipe.state_dict().items())
    for optimizer in made.optimizers.values():  # type: ignore[assignment]
        for parameter, state in optimizer.state.items():  # type: ignore[attr-defined]
            assert all(torch.equal(v, momenta[parameter][n]) for n, v in state.items())


def test_a_broken_loss_is_found_before_anything_is_logged_judged_or_stored(whole: DirRun, tmp_path: Path) -> None:
    run = dataclasses.replace(
        whole,
        tracking=dataclasses.replace(whole.tracking, log_every=50),
        storage=dataclasses.replace(whole.storage, checkpoint_every=4),
    )
    made = make_trainer(run, tmp_path, Again())
    passes = poisoned(made, 6)
    with pytest.raises(NonFiniteLoss, match="at step 6;"):
        made.run()
    assert 6 <= len(passes) <= 8
    assert [folder.name for folder in sorted(tmp_path.glob("step-*"))] == ["step-00000004"]


def test_nobody_waits_for_the_device_between_two_logged_steps(
    whole: DirRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads a value waits for the device: from the second step on nobody does."""
    optimizer = dataclasses.replace(whole.dir.optimizer, clip=1.0)
    run = dataclasses.replace(whole, dir=dataclasses.replace(whole.dir, optimizer=optimizer, ema=0.9))
    made, read = make_trainer(run, tmp_path, Again()), []

    def watch(name: str) -> None:
        inner = getattr(torch.Tensor, name)

        def noted(tensor: Tensor, *arguments: Any) -> Any:
            read.append(name)
            return inner(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, noted)

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        watch(name)
    made._step(0)
    assert read  # the first one waits: it makes the optimizer's state
    read.clear()
    readings = [made._step(step)[0] for step in range(1, 6)]
    assert not read
    assert made._read(readings[-1])["loss"] > 0
    assert read


def capture_of(run: DirRun, folder: Path, switch: Any, recorder: Again | None = None, **changes: Any) -> Any:
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, capture=switch, **changes))
    return make_trainer(run, folder, recorder).captured


def test_auto_captures_what_can_be_and_on_says_what_cannot(
    whole: DirRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert capture_of(whole, tmp_path, "auto", Again()) is not None
    assert capture_of(whole, tmp_path, "off", Again()) is None
    assert capture_of(whole, tmp_path, "auto") is None  # a CPU
    for changes, reason in (({"microbatch": 4}, "micro-batches"),):
        assert capture_of(whole, tmp_path, "auto", Again(), **changes) is None
        with pytest.raises(ConfigError, match=reason):
            capture_of(whole, tmp_path, "on", Again(), **changes)
    again = dataclasses.replace(whole, parallel=dataclasses.replace(whole.parallel, activation_checkpointing=True))
    assert capture_of(again, tmp_path, "auto", Again()) is None
    own = dataclasses.replace(whole, target=dataclasses.replace(whole.target, architecture=BATCH_NORMED))
    assert capture_of(own, tmp_path, "auto", Again()) is not None  # made of PyTorch's layers alone

    class Counting(nn.Linear):
        """Somebody's layer: nobody knows what it does in Python."""

    made = make_trainer(uncaptured(whole), tmp_path)
    made.recipe.classifier.network[-1].__class__ = Counting  # type: ignore[union-attr,index,operator]

    def make(recorder: Any) -> Any:
        return recorder

    switches: dict[Any, Any] = {
        switch: dataclasses.replace(whole, training=dataclasses.replace(whole.training, capture=switch))
        for switch in ("auto", "on")
    }
    assert captured_step(switches["auto"], ALONE, made.recipe, Again(), make) is None
    assert captured_step(switches["on"], ALONE, made.recipe, Again(), make) is not None
    monkeypatch.setattr(type(made.recipe), "capturable", False)
    with pytest.raises(ConfigError, match="depend on more than tensors"):
        captured_step(switches["on"], ALONE, made.recipe, Again(), make)
    with pytest.raises(ConfigError, match="several updates"):
        captured_step(switches["on"], ALONE, Game(), Again(), make)
    with pytest.raises(ConfigError, match="shared by 2 workers"):
        captured_step(switches["on"], Parallel(0, 2, CPU), made.recipe, Again(), make)


def test_a_step_that_drops_gradients_is_not_recorded(whole: DirRun, tmp_path: Path) -> None:
    """A recording writes to the gradients that it met: dropped ones would be memory of somebody else."""
    made = make_trainer(whole, tmp_path, Again())
    attack = made.recipe.attack

    def dropping(batch: Batch) -> Batch:
        made.recipe.zero_grad()
        return attack(batch)

    made.recipe.attack = dropping  # type: ignore[method-assign]
    for step in range(WARM_UP):
        made.step(step)
    with pytest.raises(ConfigError, match="dir cannot be captured: it drops gradients"):
        made.step(WARM_UP)


def test_a_broken_recording_leaves_the_streams_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: what PyTorch's own context does when it ends a broken recording is played."""

    class Drawn:
        """A GPU's stream of random numbers."""

        state = "recording"

        def get_state(self) -> str:
            return "7 draws"

        def set_state(self, state: str) -> None:
            self.state = state

        def graphsafe_set_state(self, other: Drawn) -> None:
            self.state = other.state

    current, drawn, pools = ["default"], Drawn(), set[str]()

    @contextlib.contextmanager
    def graph(made: Any, pool: str, stream: str, capture_error_mode: str) -> Iterator[None]:
        current[0] = stream
        pools.add(pool)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "Stream": lambda device: "side",
        "CUDAGraph": lambda: None,
        "current_stream": lambda device: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
        "graph": graph,
        "graph_pool_handle": lambda: "a pool",
        "default_generators": (None, drawn),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda device: Drawn())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: pools.remove(pool), raising=False)
    recorder = GraphRecorder(torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(lambda: None)
    assert (current, drawn.state, pools) == (["default"], "7 draws", set())


def test_a_cpu_is_refused_before_data_is_read(whole: DirRun) -> None:
    message = "training.capture is on, but a step cannot be captured here: it runs on the CPU; use auto or off"
    with pytest.raises(ConfigError, match=message):
        Run(whole, ALONE, NoTracker(), Quiet()).execute()
    assert not Path(whole.storage.uri).exists()
    check_switches(uncaptured(whole), ALONE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits_apegan_smoke", "of apegan it has several updates"),
        ("digits_ebm_smoke", "of ebm its passes depend on more than tensors"),
    ],
)
def test_a_stage_that_cannot_be_captured_is_refused_before_the_first_is_trained(name: str, words: str) -> None:
    run = preset(name)
    training = dataclasses.replace(run.training, capture="on", microbatch=None)
    on_gpu = Parallel(0, 1, torch.device("cuda"))
    with pytest.raises(ConfigError, match=words):
        check_switches(dataclasses.replace(run, training=training), on_gpu)
    plain = dataclasses.replace(preset("digits_hgd_smoke"), training=training)
    check_switches(plain, on_gpu)


def test_what_cannot_be_recorded_runs_uncaptured_unless_it_was_asked_for(whole: DirRun, tmp_path: Path) -> None:
    console = Hears()
    ended = RuntimeError("operation failed due to a previous error during capture")
    ended.__context__ = RuntimeError("operation not permitted when stream is capturing\nmore")
    auto = dataclasses.replace(whole, training=dataclasses.replace(whole.training, capture="auto"))
    plain, made = make_trainer(uncaptured(whole), tmp_path), make_trainer(auto, tmp_path, Again(ended), console=console)
    for step in range(WARM_UP + 2):
        assert made.step(step)[0] == plain.step(step)[0]
    assert console.lines == [
        "dir: its step cannot be captured (operation not permitted when stream is capturing); it runs uncaptured"
    ]
    asked = make_trainer(whole, tmp_path, Again(ended))
    for step in range(WARM_UP):
        asked.step(step)
    with pytest.raises(ConfigError, match=r"training\.capture is on, but dir cannot be captured: operation not"):
        asked.step(WARM_UP)
