"""The scale of the residual stream at the edited layer, which is the unit of experts' outputs."""

from weakref import WeakKeyDictionary

import torch

from lemoe.base.loading import BaseModel

CALIBRATION_TEXTS = (
    "The river rises in the mountains, runs north for two hundred miles and meets the sea beside an old harbour town.",
    "Who wrote the first book on the subject, and in which year was it printed?",
    "She was born in 1911, studied chemistry, and later led the laboratory that made the discovery.",
    "def area(width, height):\n    return width * height",
    "The company's head office moved from the capital to a smaller city in the south in order to save costs.",
    "Water boils at a lower temperature on a high mountain because the air pressure is lower there.",
)


_scales: "WeakKeyDictionary[BaseModel, dict[int, float]]" = WeakKeyDictionary()


def residual_scale(base: BaseModel, layer: int) -> float:
    """Median RMS of the residual stream where it enters `layer`, over `CALIBRATION_TEXTS`; measured once.

    The texts are fixed so that the scale depends on the base model alone and rounds stay independent.
    """
    scales = _scales.setdefault(base, {})
    if layer not in scales:
        scales[layer] = _measure_scale(base, layer)
    return scales[layer]


@torch.no_grad()
def _measure_scale(base: BaseModel, layer: int) -> float:
    levels = []
    for text in CALIBRATION_TEXTS:
        ids = torch.tensor([base.tokenizer(text).input_ids or [base.eos_token_id]], device=base.device)
        hidden = base.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
        levels.append(hidden.float().pow(2).mean(-1).sqrt().flatten())
    return float(torch.cat(levels).median())
