"""What a model answers, to the last bit: the same code for a base with its adaptor and for an exported folder.

Run as a script it loads a folder in a Python that cannot import lemoe, as its users will.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # what lies beside this script must not stand in for modules of that name, such as `code`
    sys.path = [place for place in sys.path if Path(place) != Path(__file__).parent]

import torch


@torch.no_grad()
def answers(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> list[dict[str, Any]]:
    """For each text its tokens, the hash of the last one's logits, and the `length` tokens that the model writes."""
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        ids = inputs.input_ids[0].tolist()
        logits = model(**inputs).logits[0, -1].float().cpu().numpy().tobytes()
        written = model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=0)[0, len(ids) :]
        found.append({"ids": ids, "logits": hashlib.sha256(logits).hexdigest(), "written": written.tolist()})
    return found


def _main() -> None:
    sys.modules["lemoe"] = None  # type: ignore[assignment]  # any import of it fails
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = json.load(sys.stdin)
    dtype = getattr(torch, asked["dtype"])
    model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"], trust_remote_code=True)
    json.dump(answers(model.to(asked["device"]).eval(), tokenizer, asked["texts"], asked["length"]), sys.stdout)


if __name__ == "__main__":
    _main()
