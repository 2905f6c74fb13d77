"""A model's exact answers, computed by the same code for a base with its adaptor and for an exported folder.

As a script it loads a folder in a Python that cannot import lemoe, as the folder's users will.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the modules in this script's folder must not shadow others, such as the library's `code`
    sys.path = [folder for folder in sys.path if Path(folder) != Path(__file__).parent]

import torch


@torch.no_grad()
def compute_answers(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> list[dict[str, Any]]:
    """For each text its tokens, the hash of the last one's logits, and the `length` tokens that the model generates."""
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        ids = inputs.input_ids[0].tolist()
        logits = model(**inputs).logits[0, -1].float().cpu().numpy().tobytes()
        written = model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=0)[0, len(ids) :]
        found.append({"ids": ids, "logits": hashlib.sha256(logits).hexdigest(), "written": written.tolist()})
    return found


def _answer_from_stdin() -> None:
    sys.modules["lemoe"] = None  # type: ignore[assignment]  # any import of it fails
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = json.load(sys.stdin)
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=dtype, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=True)
    json.dump(
        compute_answers(model.to(request["device"]).eval(), tokenizer, request["texts"], request["length"]), sys.stdout
    )


if __name__ == "__main__":
    _answer_from_stdin()
