"""The finished defense from its folder, and targets given from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dircluster
from dircluster.config import ConfigError, RunConfig, with_values
from dircluster.defenses.table import find_defense
from dircluster.evaluation.model_card import model_card
from dircluster.files import POINTER
from dircluster.models.modules import TooLargeError, at_most
from dircluster.presets import preset
from dircluster.training import checkpoint, hub_folder
from dircluster.training.export import check_begins, check_sizes
from tests.unit.training.conftest import run


def given(config: RunConfig, uri: object, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, target=dataclasses.replace(config.target, uri=str(uri), **changes))


def network(weight: float = 0.1, trainable: bool = True) -> torch.nn.Module:
    """One linear layer of constant weights for digits."""
    layer = torch.nn.Linear(64, 10)
    torch.nn.init.constant_(layer.weight, weight)
    return torch.nn.Sequential(torch.nn.Flatten(), layer.requires_grad_(trainable))


class Overflow(torch.nn.Module):
    """Its weights are finite, its logits are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = network()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(images) * 1e30 * 1e30
        return logits


NOTHING = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.AdaptiveAvgPool1d(10))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (network(0.0), None),  # a last layer may begin at zero
        (NOTHING, "stage target trains the target, but none of its parameters requires a gradient: see .*'small_cnn'"),
        (network(trainable=False), "stage target trains the target, but none of its parameters requires a gradient"),
        (network(float("nan")), r"the target holds numbers that are not finite \(NaN or infinity\) in '1.weight'"),
        (Overflow(), "the target gives logits that are not finite"),
        (torch.nn.Flatten(), "the target gives 64 classes, but data.classes is 10"),
    ],
)
def test_what_a_targets_training_may_begin_with(made: torch.nn.Module, message: str | None, smoke: RunConfig) -> None:
    with contextlib.nullcontext() if message is None else pytest.raises(ConfigError, match=f"^{message}"):
        check_begins(made, smoke)


def test_a_given_target_is_asked_for_gradients_where_it_is_trained_on(smoke: RunConfig) -> None:
    frozen = network(trainable=False)
    check_begins(frozen, given(smoke, "h.pt"))
    replaced = network(float("nan"), trainable=False)  # these weights
    check_begins(replaced, given(smoke, "h.pt"))
    check_begins(replaced, given(smoke, "h.pt", architecture="ours:make"))
    with pytest.raises(ConfigError, match=r"^stage finetune trains the target, but none"):
        check_begins(frozen, given(preset("digits_finetune_smoke"), "h.pt"))


@pytest.mark.long
def test_a_finished_defense_loads_and_classifies(smoke: RunConfig) -> None:
    folder = Path(run(smoke)["checkpoint"])
    defense = dircluster.load_defense(folder)
    assert not defense.training
    images = torch.rand(3, 1, 8, 8)
    assert defense(images).shape == (3, 10)
    assert torch.equal(defense.fixed(1)(images), dircluster.load_defense(str(folder)).fixed(1)(images))
    with pytest.raises(ConfigError, match="holds no finished defense"):
        dircluster.load_defense(next(folder.parents[1].glob("target-*")) / "final")
    stage = dircluster.load_defense(folder.parent)
    assert torch.equal(defense.fixed(1)(images), stage.fixed(1)(images))
    with pytest.raises(ConfigError, match=r"is the storage of runs, name one of its finished stages: dir-\w+/final"):
        dircluster.load_defense(folder.parents[1])
    with pytest.raises(ConfigError, match="holds no committed checkpoint"):
        dircluster.load_defense(folder.parents[2])


@pytest.mark.long
def test_given_targets(smoke: RunConfig, tmp_path: Path) -> None:
    classifier = find_defense("dir").build(dataclasses.replace(smoke, seed=5), "classifier")
    save_file(classifier.state_dict(), tmp_path / "whole.safetensors")
    torch.save({"net": classifier.network.state_dict()}, tmp_path / "bare.pt")
    outcomes = [
        run(given(smoke, tmp_path / "whole.safetensors")),
        run(given(smoke, tmp_path / "bare.pt", mean=(0.5,), std=(0.5,))),
    ]
    shas = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("whole.safetensors", "bare.pt")]
    assert [outcome["target"]["sha256"] for outcome in outcomes] == shas
    assert f"- target: given, `{tmp_path}/bare.pt` (SHA-256 {shas[1]}), small_cnn" in model_card(
        given(smoke, tmp_path / "bare.pt"), outcomes[1], "abc"
    )
    assert outcomes[0]["checkpoint"] == outcomes[1]["checkpoint"]  # the same weights are the same target
    loaded = dircluster.load_defense(outcomes[0]["checkpoint"]).classifier
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), classifier.parameters(), strict=True))
    assert run(given(smoke, outcomes[0]["checkpoint"]))["checkpoint"] == outcomes[0]["checkpoint"]


def test_targets_that_do_not_fit_are_one_line(smoke: RunConfig, tmp_path: Path) -> None:
    seven = dataclasses.replace(smoke, data=dataclasses.replace(smoke.data, classes=7))
    save_file(find_defense("dir").build(seven, "classifier").state_dict(), tmp_path / "seven.safetensors")
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "seven.safetensors").read_bytes()[:-100])
    for name, message in {
        "seven": r"'network.7.bias' is \(7,\), not \(10,\); check data.classes",
        "foreign": "is missing",
        "cut": "is not a sound safetensors file",
        "nowhere": "does not exist",
    }.items():
        with pytest.raises(ConfigError, match=message) as refusal:
            run(given(smoke, tmp_path / f"{name}.safetensors"))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 2 * 10**9}, "the denoiser that the settings describe has more than 1,000,000 numbers"),
        ({"model.encoder_depth": 2 * 10**9}, "the denoiser that the settings describe has more"),
        ({"model.encoder_depth": 400}, "the denoiser that the settings describe has more"),
        ({"data.classes": 2 * 10**9}, "the classifier that the settings describe has more"),
    ],
)
def test_networks_that_there_is_no_place_for_are_not_made(
    smoke: RunConfig, changes: dict[str, Any], message: str
) -> None:
    check_sizes(smoke, 10**6)
    with pytest.raises(ConfigError, match=f"^{message}.*give smaller sizes") as refusal:
        check_sizes(with_values(smoke, changes), 10**6)
    assert "\n" not in str(refusal.value)


def test_what_other_threads_make_is_not_counted() -> None:
    made: list[torch.nn.Module] = []
    other = threading.Thread(target=lambda: made.append(torch.nn.Linear(100, 100)))
    with at_most(10, tensors=1):
        other.start()
        other.join()
        with pytest.raises(TooLargeError):
            torch.nn.Linear(3, 3, bias=False, device="meta").register_buffer("more", torch.zeros(2))
    assert len(made) == 1


def test_layers_without_end_are_not_made(smoke: RunConfig) -> None:
    with pytest.raises(ConfigError, match="or 10,000 tensors"):
        check_sizes(with_values(smoke, {"model.encoder_depth": 1000}), 10**15)


def test_code_stored_with_older_models_still_finds_its_loader() -> None:
    from dircluster.training import bundle, export

    assert bundle.load_defense_folder is export.load_defense_folder


@pytest.fixture
def final(smoke: RunConfig, tmp_path: Path) -> Path:
    """The folder of a finished defense that nobody trained."""
    defense = find_defense("dir")
    networks = {name: defense.build(smoke, name).state_dict() for name in ("denoiser", "classifier")}
    checkpoint.write(tmp_path / "final", networks, {"stage": "dir", "defense": defense.to_plain(smoke)}, "key")
    return tmp_path / "final"


def changed(final: Path, section: str, name: str, value: Any) -> Path:
    """The same folder, with hashes that fit, whose description says something else."""
    found = checkpoint.read(final)
    found.state["defense"][section][name] = value
    checkpoint.write(final, found.tensors, found.state, "key")
    return final


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("model", "encoder_depth", 10**9, "describes a network larger than its [0-9,]+ stored weights"),
        ("model", "width", 3 * 10**8, "describes a network larger"),
        ("model", "width", 2 * 10**9, "describes a network larger"),
        ("model", "mlp_ratio", 2**62, "describes a network larger"),
        ("model", "mlp_ratio", 10**30, "describes a network larger"),
        ("data", "height", 10**4, "describes a network larger"),
        ("data", "height", 10**9, "data.height must be at most 65536 pixels"),
        ("data", "classes", 10**9, "describes a network larger"),
        ("data", "height", 1.5, "does not say what defense it holds: DataConfig.height cannot be 1.5"),
        ("data", "channels", "1", "DataConfig.channels cannot be '1'"),
        ("data", "width", True, "DataConfig.width cannot be True"),
        ("model", "patch", 0, "model.patch must be positive"),
        ("model", "head", "other", "ModelConfig.head cannot be 'other'"),
        ("masking", "ratio", None, "MaskingConfig.ratio cannot be None"),
        ("masking", "count", 10**9, "masking.count must be at most the 16 patches"),
        ("model", "depth", 3, "ModelConfig has no field depth"),
    ],
)
def test_a_folder_that_describes_something_else_is_refused(
    final: Path, section: str, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        dircluster.load_defense(changed(final, section, name, value))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("network", ["denoiser", "classifier"])
def test_a_folder_of_numbers_that_are_not_finite_is_refused(final: Path, network: str) -> None:
    found = checkpoint.read(final)
    name, value = next(iter(found.tensors[network].items()))
    checkpoint.write(
        final, {**found.tensors, network: {**found.tensors[network], name: value * float("nan")}}, found.state, "key"
    )
    with pytest.raises(ConfigError, match=f"not finite .NaN or infinity. in '{name}'"):
        dircluster.load_defense(final)
    checkpoint.write(final, {"denoiser": found.tensors["denoiser"]}, found.state, "key")
    with pytest.raises(ConfigError, match="holds no weights of its classifier"):
        dircluster.load_defense(final)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_a_loaded_defense_is_of_float32_on_the_cpu(final: Path, default: torch.dtype) -> None:
    images = torch.rand(2, 1, 8, 8)
    expected = dircluster.load_defense(final).fixed(1)(images)
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        defense = dircluster.load_defense(final)
        found, drawn = defense.fixed(1)(images), defense(images)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, expected)
    assert drawn.dtype == torch.float32


def test_a_uri_that_names_nothing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for uri, message in {
        "s3://": "s3:// must name a bucket",
        "gs://bucket/x": "is not on this machine",
        "https://127.0.0.1/x": "is not on this machine",
        str(tmp_path / "none"): "none holds no committed checkpoint: a defense is the folder of a finished stage",
        __file__: r"test_export.py is a file: a defense is .* weights alone are for --target.uri$",
        "./mine.py:make": "mine.py:make holds no committed checkpoint: a defense is the folder",
        "a\nb": r"'a.nb' names nothing: it holds a line break",
        "a\0b": r"'a.x00b' names nothing: no name holds a zero byte",
    }.items():
        with pytest.raises(ConfigError, match=message) as refusal:
            dircluster.load_defense(uri)
        assert "\n" not in str(refusal.value)


def test_a_folder_as_hubs_show_it_loads_again(final: Path, tmp_path: Path) -> None:
    images, hub = torch.rand(2, 1, 8, 8), tmp_path / "hub"
    hub_folder.check(hub)
    hub_folder.write(final, hub, "# A card\n")
    assert sorted(file.name for file in hub.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (hub / "README.md").read_text().startswith("---\nlibrary_name: dircluster\n")
    found = dircluster.load_defense(hub)
    assert torch.equal(found.fixed(1)(images), dircluster.load_defense(final).fixed(1)(images))
    hub_folder.check(hub)
    hub_folder.write(final, hub, "# Another card\n")
    config = json.loads((hub / "config.json").read_text())
    del config["defense_sha256"]  # as earlier versions wrote it
    (hub / "config.json").write_text(json.dumps(config))
    assert torch.equal(found.fixed(1)(images), dircluster.load_defense(hub).fixed(1)(images))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda hub: (hub / "model.safetensors").write_bytes(b"12345678"), "is damaged: model.safetensors is not"),
    "not fetched": (
        lambda hub: (hub / "model.safetensors").write_bytes(POINTER + b"v1\noid sha256:00\nsize 9\n"),
        "model.safetensors is a pointer of Git LFS, not the file itself: git lfs pull fetches it",
    ),
    "no weights": (lambda hub: (hub / "model.safetensors").unlink(), "has a config.json, but no model.safetensors"),
    "no JSON": (lambda hub: (hub / "config.json").write_text("{"), "its config.json cannot be read"),
    "of others": (
        lambda hub: (hub / "config.json").write_text('{"model_type": "vit"}'),
        "holds no defense of dircluster",
    ),
    "a list": (lambda hub: (hub / "config.json").write_text(json.dumps([1])), "holds no defense of dircluster"),
    "other masks": (lambda hub: written(hub, "masking", ratio=0.25), "is not what was written with its weights"),
    "other heads": (lambda hub: written(hub, "model", heads=3), "is not what was written with its weights"),
}


def written(hub: Path, section: str, **values: Any) -> None:
    """Write a config.json whose defense has other settings in a section."""
    config = json.loads((hub / "config.json").read_text())
    config["defense"][section] |= values
    (hub / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_one_is_one_line(final: Path, tmp_path: Path, how: str) -> None:
    hub_folder.write(final, tmp_path / "hub", "")
    damage, message = DAMAGE[how]
    damage(tmp_path / "hub")
    with pytest.raises(ConfigError, match=message):
        dircluster.load_defense(tmp_path / "hub")


def test_an_export_that_did_not_fit_leaves_its_place_free(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, write_text = tmp_path / "hub", Path.write_text
    hub_folder.write(final, hub, "")

    def full(file: Path, *given: Any, **how: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"^--export .*hub cannot be written: No space left on device$"):
        hub_folder.write(final, hub, "")
    monkeypatch.setattr(Path, "write_text", write_text)
    hub_folder.check(hub)


def test_an_export_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    for name, config in (("bert", '{"model_type": "bert"}'), ("list", "[1]"), ("cut", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    others = dict.fromkeys(("full", "bert", "list", "cut"), "holds other files: name a new folder")
    for name, message in {"a/b": "does not exist", "file": "is a file", **others}.items():
        with pytest.raises(ConfigError, match=message):
            hub_folder.check(tmp_path / name)
    with pytest.raises(ConfigError, match=r"^--export /proc/x cannot be written: \w"):
        hub_folder.check(Path("/proc/x"))
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        hub_folder.check(tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} == {"empty", "file", *others}
    assert list((tmp_path / "empty").iterdir()) == []
