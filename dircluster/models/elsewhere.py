"""Networks that are made elsewhere: timm's by name, with or without published weights, and anybody's factories."""

from __future__ import annotations

import importlib
import inspect
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from dircluster.config import ANY_ERROR, ConfigError, DataConfig, first_line, named_line
from dircluster.models.modules import defaults_kept, device_of, unfinished
from dircluster.models.precision import keep_ends_whole, keep_whole

CLASSES = ("num_classes", "classes", "n_classes", "nb_classes", "nclasses", "num_class", "n_class")
CHANNELS = ("in_chans", "channels", "in_channels", "num_channels", "n_channels", "input_channels", "num_input_channels")
"""What factories call the number of classes and of channels: the first that one takes."""
PATIENCE = 1.5
"""Seconds that a server of published weights may take to answer."""

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and std, of each channel or one for all."""


def timm_network(name: str, classes: int | None, channels: int, pretrained: bool) -> tuple[nn.Module, Normalization]:
    """timm's network of that name and its published mean and std; ``pretrained`` fetches weights with their own head.

    Raises ConfigError: unknown, or weights that are neither here nor to be had within seconds.
    """
    import timm  # it takes longer than torch, and most runs need none of its models

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:3]) or "see timm.list_models()"
        raise ConfigError(f"timm has no model {name!r}; {near}")
    sizes = {} if classes is None else {"num_classes": classes}
    try:
        with _cache_alone_unless_answered(timm.get_pretrained_cfg(name) if pretrained else None):
            network: nn.Module = timm.create_model(name, in_chans=channels, pretrained=pretrained, **sizes)
    except Exception as error:  # a download that fails may raise anything; its first line says why
        raise ConfigError(f"timm:{name} could not be made: {first_line(error)}") from error
    published: Any = network.pretrained_cfg
    mean, std = (tuple(published[name])[:channels] for name in ("mean", "std"))
    for name in (published.get("first_conv"), published.get("classifier")):
        for path in (name,) if isinstance(name, str) else name or ():
            keep_whole(network.get_submodule(path))
    return network, (mean, std)


@contextmanager
def _cache_alone_unless_answered(weights: Any) -> Iterator[None]:
    """Where the server of published weights does not answer, the cache is asked alone: the hub tries for a minute."""
    import huggingface_hub.constants as hub

    url = None if weights is None else hub.ENDPOINT if weights.hf_hub_id else weights.url
    if url is None or (not hub.HF_HUB_OFFLINE and answers(url)):
        yield
        return
    if not weights.hf_hub_id:
        raise OSError(f"{urlsplit(url).hostname} does not answer")
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{urlsplit(url).hostname} does not answer and the weights are not in the cache; give them as a file:"
            " --target.uri FILE --target.architecture timm:NAME"
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = before


def answers(url: str) -> bool:
    """Whether a server answers within PATIENCE, whatever it says; proxies of the environment are used."""
    found: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                found.append(True)
        except urllib.error.HTTPError:
            found.append(True)
        except OSError:
            found.append(False)

    asking = threading.Thread(target=ask, daemon=True)  # looking a name up knows no timeout
    asking.start()
    asking.join(PATIENCE)
    return bool(found and found[0])


def factory_network(path: str, data: DataConfig) -> nn.Module:
    """What package.module:factory makes for ``data``, whatever it does to PyTorch's defaults.

    Raises ConfigError where it raises, or that is no module whose weights are tensors with values.
    """
    module_name, _, attribute = path.partition(":")
    with defaults_kept():
        try:
            make = attrgetter(attribute)(importlib.import_module(module_name))
        except ANY_ERROR as error:
            raise ConfigError(f"target.architecture {path!r} cannot be imported: {named_line(error)}") from error
        if isinstance(make, nn.Module):
            raise ConfigError(f"target.architecture {path!r} is a network: name the function or class that makes it")
        try:
            made = _called(make, data)
        except ANY_ERROR as error:
            raise ConfigError(f"target.architecture {path!r} raised {named_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"target.architecture {path!r} must return a torch.nn.Module, got {type(made).__name__}")
    keep_ends_whole(made, torch.zeros(1, data.channels, data.height, data.width, device=device_of(made)))
    other = [name for name, value in made.state_dict().items() if not _is_stored(value)]
    if wrong := unfinished(made) or (f"keeps {other[0]!r}, which is no dense tensor of numbers" if other else ""):
        raise ConfigError(f"target.architecture {path!r} makes a network that {wrong}")
    return made


def _is_stored(value: Any) -> bool:
    """Whether checkpoints hold ``value`` of a state_dict."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and not value.is_quantized and value.dtype != torch.complex128


def _called(make: Callable[..., Any], data: DataConfig) -> Any:
    """``make`` with the numbers of classes and channels by the names that it takes; what it has no name for is left.

    Where it takes any name (``**kwargs``), what stands behind it says which it knows.
    """
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return make(classes=data.classes, channels=data.channels)
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    options: list[list[dict[str, int]]] = []
    for names, value in ((CLASSES, data.classes), (CHANNELS, data.channels)):
        known = [{name: value} for name in names if name in parameters]
        options.append(known[:1] or [*({name: value} for name in names[:3] if open_ended), {}])
    refused: Exception | None = None
    for classes in options[0]:
        for channels in options[1]:
            try:
                return make(**classes, **channels)
            except (TypeError, KeyError) as error:
                other = isinstance(error, KeyError) and error.args[0] in (*CLASSES, *CHANNELS)
                if not open_ended or not (other or "unexpected keyword argument" in str(error)):
                    raise
                refused = refused or error
    assert refused is not None
    raise refused
