"""What the name of a model means: a local folder, a preset's name, or an id on the hub."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from lemoe.base import embedded
from lemoe.data.yaml_file import read_yaml
from lemoe.errors import InputError, ModelError


@dataclass(frozen=True)
class ModelSource:
    """What the name of a model means; `layers` holds the layer to edit by method, where the preset says one."""

    name: str
    location: str
    revision: str | None = None
    embedded: bool = False
    layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """The repository on the hub, if it is there."""
        if self.embedded:
            return embedded.HUB_ID
        return None if Path(self.location).is_dir() or self.location.count("/") != 1 else self.location

    @property
    def shared_name(self) -> str:
        """A name that is safe to publish: of a local folder, only its last part."""
        return self.name if self.hub_id else Path(self.location).name

    def __str__(self) -> str:
        if self.embedded:
            return f"{self.name} = {embedded.TITLE}, embedded"
        where = f"{self.location}@{self.revision}" if self.revision else self.location
        return where if where == self.name else f"{self.name} = {where}"


def model_presets() -> dict[str, Mapping[str, Any]]:
    """The presets of models by name: ours, overridden by those of the user's own file."""
    presets = yaml.safe_load(resources.files("lemoe").joinpath("presets/models.yaml").read_text())
    own = Path(os.environ.get("LEMOE_MODELS") or Path(platformdirs.user_config_dir("lemoe")) / "models.yaml")
    if not own.is_file():
        if os.environ.get("LEMOE_MODELS"):
            raise InputError(f"{own}: no such file, but LEMOE_MODELS names it")
        return dict(presets)
    mine = read_yaml(own) or {}
    if not isinstance(mine, dict) or not all(_is_valid_preset(*item) for item in mine.items()):
        raise InputError(f"{own}: expected lines like `name: {{hub: org/name, layers: {{anchor: 28}}}}`")
    return {**presets, **mine}


_ENTRY_KEYS = {"hub", "embedded", "layers"}


def _is_valid_preset(name: Any, entry: Any) -> bool:
    if not isinstance(name, str) or not isinstance(entry, dict):
        return False
    if len({"hub", "embedded"} & set(entry)) != 1 or not set(entry) <= _ENTRY_KEYS:
        return False
    layers = entry.get("layers", {})
    texts = [entry[key] for key in ("hub", "embedded") if key in entry]
    return all(isinstance(text, str) and text for text in texts) and (
        isinstance(layers, dict) and all(type(layer) is int for layer in layers.values())
    )


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """What `name` means: a folder, a preset name, or a hub id `org/name[@revision]`.

    Raises:
        ModelError: if it is none of these, with the names that are known.
    """
    if name and Path(name).is_dir():
        return ModelSource(name, str(Path(name)), revision)
    presets = model_presets()
    if name in presets:
        entry = presets[name]
        if "embedded" in entry and revision:
            raise ModelError(f"`revision` {revision}: {name} is embedded and has one revision only")
        if "embedded" in entry:
            return ModelSource(name, str(entry["embedded"]), None, embedded=True, layers=entry.get("layers", {}))
        return _hub_source(name, str(entry["hub"]), revision, entry.get("layers", {}))
    if "/" in name and not name.startswith((".", "/", "~")):
        return _hub_source(name, name, revision, {})
    nearest = difflib.get_close_matches(name, presets, 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    raise ModelError(
        f"`model` {name}: no such folder or preset{hint} Give a local folder, a hub id (org/name[@revision]), "
        f"or one of: {', '.join(sorted(presets))}"
    )


def _hub_source(name: str, hub: str, revision: str | None, layers: Mapping[str, int]) -> ModelSource:
    location, _, pinned = hub.partition("@")
    return ModelSource(name, location, revision or pinned or None, layers=layers)
