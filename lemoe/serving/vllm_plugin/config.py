"""The configuration of an exported folder, as vLLM reads it: that of its base, with an edited architecture."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

PREFIX = "Edited"  # in front of a base's architecture: the same with edits


def edited_name(architecture: str) -> str:
    """The architecture of a base with edits."""
    return f"{PREFIX}{architecture}"


class LemoeConfig(PretrainedConfig):
    """Stands for the configuration in an exported folder, and becomes that of the folder's base when it is read."""

    model_type = "lemoe"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = config_dict["lemoe"]["base"]
        values = {name: value for name, value in config_dict.items() if name not in ("auto_map", "model_type")}
        values["architectures"] = [edited_name(name) for name in base["architectures"]]
        return type(AutoConfig.for_model(base["model_type"])).from_dict(values, **kwargs)
