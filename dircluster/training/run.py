"""One run: the stages of its defense, then the evaluation. A finished stage is reused, a begun one resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dircluster.config import ConfigError, RunConfig, as_hashed, digest, first_line, flatten, is_own_code, local_path
from dircluster.data.layout import data_cache
from dircluster.data.sources import load
from dircluster.data.split import Dataset
from dircluster.defenses.stage import Stage, architecture
from dircluster.defenses.table import DEFENSES, find_defense
from dircluster.distributed.parallel import Parallel, gather_full
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.evaluation import EvalShard, run
from dircluster.evaluation.meeting import meet
from dircluster.evaluation.provenance import facts_of
from dircluster.evaluation.results import to_plain
from dircluster.evaluation.sample import class_notes, judged_rows
from dircluster.evaluation.session import evaluation_of, plan, report, stores_of
from dircluster.evaluation.sharing import shares
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import to_bytes
from dircluster.models.precision import is_half, reads_images_whole
from dircluster.training import checkpoint, export, stages
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.compiling import uncompiled
from dircluster.training.interrupt import Interrupted, interruptible, waiting
from dircluster.training.locks import TakenOverError, stage_lock
from dircluster.training.memory import peak, resting
from dircluster.training.protocols import Console, StageRecord, Tracker
from dircluster.training.retry import retry
from dircluster.training.stage_folder import StageFolder, find_stage_folder, keep_once
from dircluster.training.step import check_shared
from dircluster.training.switches import check_switches
from dircluster.training.trainer import Trainer


class Run:
    """A run on one worker. All workers make the same one and call :meth:`execute` together."""

    def __init__(
        self,
        config: RunConfig,
        parallel: Parallel,
        tracker: Tracker,
        console: Console,
        *,
        owner: str = "",
        fresh: bool = False,
        until: str = "",
        version: str = "",
        open_path: Callable[[str], Path] = local_path,
    ) -> None:
        """``owner`` names the job; with ``fresh`` its stages start again, in folders that carry the name.

        ``until`` names a stage after which the run ends. ``version`` is that of the code, for what is trained to be
        recorded with; nothing is where it is empty.
        ``open_path`` opens the URIs of storage, data and target.
        """
        self.config, self.parallel, self.tracker, self.console = config, parallel, tracker, console
        self.owner, self.token, self.until = owner, owner if fresh else None, until
        self.version = version
        self.open_path = open_path
        self.storage = open_path(config.storage.uri)
        self.defense = find_defense(config.defense)
        self.selection: dict[str, Any] = {}
        """Held-out accuracies of the weights that each stage ended on; None where it judged nothing."""
        self.seconds: dict[str, float] = {}
        """What was trained and evaluated took, by stage: nothing of what was reused."""
        self.alone: dict[str, str | None] = {}
        """Why several workers cannot share a stage's steps, by its name; None where they can."""
        self.resumed: list[str] = []
        """Of these, what an earlier run had begun: they took their rest alone."""
        self.memory: dict[str, int] = {}
        """Peak bytes on this worker's device, or of its process on a CPU, by the same names."""
        self.folders: dict[str, str] = {}
        """Of the stages that were trained."""
        self.trained_by: dict[str, list[str]] = {}
        """The versions of the code that trained each stage, reused ones too; empty where none was recorded."""
        self.target: dict[str, Any] | None = None
        """The target that was given, where one was: its URI and SHA-256."""

    def execute(self) -> dict[str, Any]:
        """Train what is not there yet and judge it: -> checkpoint, results and selection, as plain data.

        Where the run ends early, -> the selection alone.

        Raises ConfigError, Interrupted or NonFiniteLoss on all workers.
        """
        config, parallel = self.config, self.parallel
        check_switches(config, parallel)
        with waiting(self.console):
            self._load_everywhere()
        inputs: dict[str, str | None] = {"data": self.data.fingerprint}
        networks = stages.Networks(config, parallel)
        with uncompiled(config.training.compiles):  # of one and of two images, which no step has
            export.check_begins(networks["classifier"], config)
        if self.defense.name not in DEFENSES and not is_own_code(config.target):
            first = self.defense.defended(config, networks).to(parallel.device)
            self._meet(VictimModel(first, first.name))  # what cannot be judged says so before anything is trained
        self._name_what_rounds(networks)
        done: StageFolder | None = None
        planned = stages.stages_of(config)
        for stage in planned:  # one that cannot work with the target says so before anything is trained
            self.alone[stage.name] = stage.recipe(networks).alone
        networks.renew(tuple(networks))  # recipes freeze what they do not train
        for stage in planned:
            facts = {"defense": self.defense.to_plain(config)} if stage is planned[-1] else {}
            done = self._stage(stage, inputs, networks, facts)
            inputs[stage.name] = done.digest
            if stage.name == self.until:
                return {"selection": self.selection}
        assert done is not None, "a defense has at least one stage"
        rows = self._evaluate(done, networks)
        if parallel.first:
            self.tracker.results(rows, done.final)
        return {
            "checkpoint": str(done.final.absolute()),
            "results": rows,
            "selection": self.selection,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "memory": self.memory,
            "folders": self.folders,
            "trained_by": self.trained_by,
            "data": self.data.fingerprint,
            "target": self.target,
        }

    def _name_what_rounds(self, networks: stages.Networks) -> None:
        """Say which networks of the run round the images that they are given, to bf16."""
        if not self.parallel.first or not is_half(self.config.training.precision, self.parallel.device):
            return
        for name, network in networks.items():
            if any(True for _ in network.parameters()) and not reads_images_whole(network):
                self.console.say(
                    f"{name}: which of its layers reads images is not known; in bf16 it rounds them, and attacks are"
                    " weaker: use --training.precision fp32, or models.precision.keep_whole"
                )

    def _load_everywhere(self) -> None:
        """One download or one error, then every worker reads."""
        self.parallel.first_does(self._load_data)
        if not self.parallel.first:
            self._load_data()
        for note in self.data.notes if self.parallel.first else ():
            self.console.say(f"data: {note}")

    def _load_data(self) -> None:
        config = self.config
        self.data: Dataset = load(config.data, config.seed, data_cache(config.storage), self.open_path)

    def _given_target(self, networks: stages.Networks) -> StageFolder:
        """Take the target that ``target.uri`` names."""
        with waiting(self.console):
            key, folder, sha256, notes = self.parallel.first_does(self._keep_given_target)
        self.target = {"uri": self.config.target.uri, "sha256": sha256}
        stage_folder = StageFolder("target", key, self.open_path(folder))
        kept = checkpoint.read(stage_folder.final, stage_folder.key).tensors["classifier"]
        networks["classifier"].load_state_dict(kept)
        if self.parallel.first:
            for note in (f"taken from {self.config.target.uri} (SHA-256 {sha256[:16]})", *notes):
                self.console.say(f"target: {note}")
        return stage_folder

    def _keep_given_target(self) -> tuple[str, str, str, list[str]]:
        given = export.given_target(self.config, self.open_path)
        weights = given.classifier.state_dict()
        key = digest({"target": architecture(self.config), "weights": {k: _fingerprint(v) for k, v in weights.items()}})
        stage_folder = find_stage_folder(self.storage, "target", key)

        def write() -> None:
            checkpoint.write(stage_folder.final, {"classifier": weights}, {"stage": "target"}, key)

        keep_once(stage_folder, write, self.owner, self.console.say, self.config.storage.patience)
        return key, str(stage_folder.folder), given.sha256, given.notes

    def _stage(
        self, stage: Stage, inputs: Mapping[str, str | None], networks: stages.Networks, facts: dict[str, Any]
    ) -> StageFolder:
        """Bring a stage to its end, from wherever it stands; the networks that it stores then hold the result."""
        config, parallel = self.config, self.parallel
        if stage.name == "target" and config.target.uri is not None:
            return self._given_target(networks)
        key = stages.stage_key(config, stage, inputs)
        folder = parallel.first_does(lambda: str(find_stage_folder(self.storage, stage.name, key, self.token).folder))
        stage_folder = StageFolder(stage.name, key, self.open_path(folder))
        began = time.monotonic()
        if not parallel.first_does(lambda: self._is_finished(stage_folder)):
            self._check_shared(stage)
            resting(parallel.device)
            self._train(stage, stage_folder, networks, facts)
            self.memory[stage.name], self.folders[stage.name] = peak(parallel.device), str(stage_folder.folder)
            self.seconds[stage.name] = time.monotonic() - began
        elif parallel.first:
            self.console.say(f"{stage.name}: reused from {stage_folder.folder}")
            self._send_again(stage, stage_folder)
            self.tracker.reused(stage.name, stage_folder.folder.name)
        finished = checkpoint.read(stage_folder.final, key)
        networks.renew(stage.modules)  # what was trained may lie in shards
        for name in stage.modules:
            networks[name].load_state_dict(finished.tensors[name])
        self.selection[stage.name] = _of_kept(finished.state["best"])
        self.trained_by[stage.name] = parallel.first_does(lambda: list(stage_folder.trained_by))
        return stage_folder

    def _check_shared(self, begun: Stage) -> None:
        """Raise ConfigError where the workers cannot share a stage that is ``begun``, or one after it."""
        planned = stages.stages_of(self.config)
        for stage in planned[[each.name for each in planned].index(begun.name) :]:
            if stage.epochs:
                check_shared(stage, self.alone[stage.name], self.config, self.parallel)

    def _is_finished(self, stage_folder: StageFolder) -> bool:
        try:
            if stage_folder.digest is None:
                return False
            checkpoint.read(stage_folder.final, stage_folder.key)
        except checkpoint.DamagedError as error:
            self.console.say(f"{error}; making it again from the stage's checkpoints")
            return False
        return True

    def _train(
        self,
        stage: Stage,
        stage_folder: StageFolder,
        networks: stages.Networks,
        facts: dict[str, Any],
    ) -> None:
        with contextlib.ExitStack() as held:
            holder = stage_lock(stage_folder.folder, self.owner, self.console.say)
            checks: list[Callable[[], None]] = []
            self.parallel.first_does(lambda: checks.append(held.enter_context(holder)))
            guard = checks[0] if checks else _free
            self._train_alone(stage, stage_folder, networks, facts, guard)

    def _train_alone(
        self,
        stage: Stage,
        stage_folder: StageFolder,
        networks: stages.Networks,
        facts: dict[str, Any],
        guard: Callable[[], None],
    ) -> None:
        config, parallel = self.config, self.parallel
        for note in stage.notes if parallel.first else ():
            self.console.say(f"{stage.name}: {note}")
        parallel.first_does(lambda: self._begin_version(stage_folder))
        loader = stages.loader_of(stage, self.data.train, config, parallel)
        record = self.tracker.stage(stage.name, stage_folder.folder.name, self._facts(stage))
        checkpoints = Checkpoints(stage_folder.folder, stage_folder.key, self.console.say, guard)
        recipe = stage.recipe(networks)
        status = "FAILED"
        try:
            trainer = Trainer(
                stage, recipe, loader, self.data.held_out, config, parallel, checkpoints, record, self.console
            )
            with self._within_memory("--training.microbatch"):
                best = trainer.run()
            self.resumed += [stage.name] if trainer.begun_at else []
            state = {"stage": stage.name, "best": best, **facts}
            tensors = {name: gather_full(networks[name].state_dict(), parallel.first) for name in stage.modules}

            def finish() -> None:
                guard()
                self._keep_unsent(record, stage_folder)
                self._add_version(stage_folder)
                checkpoint.write(stage_folder.final, tensors, state, stage_folder.key)

            parallel.first_does(lambda: self._persist(finish))
            parallel.wait()  # nobody reads before it is committed
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            record.end(status)

    @contextlib.contextmanager
    def _within_memory(self, setting: str) -> Iterator[None]:
        """Raise ConfigError where a GPU's memory does not hold what ``setting`` makes smaller.

        Where there are several workers, what ends one has to end them all: it is no error of their settings to them.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.parallel.world > 1:
                raise
            raise ConfigError(f"{first_line(error)[:80]}...: use a smaller {setting}") from error

    def _begin_version(self, stage_folder: StageFolder) -> None:
        """Record the code before its first checkpoint; where storage is away, the end of the stage does."""
        with contextlib.suppress(Exception):
            self._add_version(stage_folder)

    def _add_version(self, stage_folder: StageFolder) -> None:
        if self.version:
            stage_folder.add_version(self.version)

    def _keep_unsent(self, record: StageRecord, stage_folder: StageFolder) -> None:
        """What the tracker has not received of a stage that ends: the process may be killed before it is sent."""
        points, pictures = record.unsent()
        if points or pictures:
            checkpoint.write(stage_folder.folder / "unsent", {"unsent": pictures}, {"unsent": points}, stage_folder.key)

    def _persist(self, write: Callable[[], None]) -> None:
        """``write``, tried again for up to ``storage.patience`` seconds while storage refuses."""

        def complain(error: Exception) -> None:
            self.console.say(f"the stage's result cannot be stored yet: {first_line(error)}")

        with waiting(self.console):
            retry(write, complain=complain, patience=self.config.storage.patience, final=(TakenOverError,))

    def _send_again(self, stage: Stage, stage_folder: StageFolder) -> None:
        if checkpoint.digest(stage_folder.folder / "unsent") is None:
            return
        try:
            kept = checkpoint.read(stage_folder.folder / "unsent", stage_folder.key)
        except checkpoint.CheckpointError as error:
            self.console.say(f"{error}; some points of {stage.name} may be missing in MLflow")
            return
        record = self.tracker.stage(stage.name, stage_folder.folder.name, self._facts(stage))
        record.resend(kept.state["unsent"], kept.tensors["unsent"])
        record.end("FINISHED")

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """The settings that a record of the stage shows: none that another run of the same stage may change."""
        return flatten(as_hashed(stages.stage_settings(self.config, stage), later={}))

    def _meet(self, victim: VictimModel) -> None:
        """Raise ConfigError where it cannot be judged; learn whether it draws at random."""
        config, some, labels = self.config, self.data.test.pixels(slice(8)), self.data.test.labels
        with uncompiled(config.training.compiles):
            meet(victim, some.to(self.parallel.device), int(labels.max()), config.data.classes)

    def _evaluate(self, stage_folder: StageFolder, networks: stages.Networks) -> list[dict[str, Any]]:
        """The rows of the suite. Workers share its shards out; what is finished stays when a run is interrupted."""
        config, parallel, settings = self.config, self.parallel, self.config.evaluation
        say: Callable[[str], None] = self.console.say if parallel.first else lambda line: None
        began, test = time.monotonic(), self.data.test.take(judged_rows(len(self.data.test), settings))
        defense = self.defense.defended(config, networks).to(parallel.device)
        victim, own = VictimModel(defense, defense.name), is_own_code(config.target)
        if own or self.defense.name not in DEFENSES:  # of what is this project's all is known
            with self._within_memory("--evaluation.rows"), interruptible(defense.classifier, self.console):
                self._meet(victim)
        for note in victim.notes:
            say(f"evaluation: {note}")
        table_only = dataclasses.replace(settings, verdict=False)
        planned = plan(victim, config.attack, table_only)
        facts = facts_of(stage_folder.digest, self.data.fingerprint, len(test), config.seed, settings)
        stores = stores_of(victim, facts, self.storage)
        evaluation = evaluation_of(planned, victim, len(test), config.seed, settings, *stores)

        def batch(start: int, stop: int) -> tuple[Tensor, Tensor]:
            rows = slice(start, stop)
            return test.pixels(rows).to(parallel.device), test.labels[rows].to(parallel.device)

        begun: list[AttackSpec] = []

        def on_shard(shard: EvalShard, done: int, total: int) -> None:
            if shard.spec not in begun:
                begun.append(shard.spec)
                say(f"evaluation: {shard.spec.name}, randomness {shard.spec.randomness}, of {shard.spec.judged}")

        for note in class_notes(self.data.test.labels, table_only):
            say(f"evaluation: {note}")
        left = parallel.first_does(lambda: len(evaluation.open_shards()))
        if left:
            say(f"evaluation: suite {settings.suite} on {len(test)} test images")
            resting(parallel.device)
            listening = interruptible(defense.classifier, self.console)
            with self._within_memory("--evaluation.rows"), listening, uncompiled(config.training.compiles):
                run(evaluation, batch, on_shard, shares(evaluation, parallel.world)[parallel.rank].__contains__)
            if signal := evaluation.wait(self.console.stop_signal):  # no collective: another worker may take long
                raise Interrupted(signal)
            parallel.wait()
            self.resumed += ["evaluation"] if left < len(list(evaluation.shards())) else []
            self.memory["evaluation"] = peak(parallel.device)
            self.seconds["evaluation"] = time.monotonic() - began
            say(f"evaluation: done in {self.seconds['evaluation']:.0f} s")
        else:
            say(f"evaluation: reused from {stores[0].folder}")
        rows: list[dict[str, Any]] = parallel.first_does(
            lambda: to_plain(report(evaluation, planned, victim.name, settings).rows)
        )
        return rows


def _of_kept(best: dict[str, Any] | None) -> dict[str, Any] | None:
    """A stage's best selection; its last one where it kept its last weights, which may be worse."""
    return best if best is None or best["folder"] is not None else {**best, **best["last"]}


def _free() -> None:
    """Another worker holds the stage."""


def _fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(to_bytes(tensor)).hexdigest()
