"""What vLLM answers, as a script: a JSON request on standard input, answers as the last line of standard output.

A request has the `folder` of the model, `options` of `vllm.LLM`, batches of `prompts` (token ids), of which each is
asked after the one before it, and the `tokens` to be written, greedily; `ignore_eos` by default.
"""

import json
import os
import subprocess
import sys
from typing import Any

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def run_vllm(request: dict[str, Any]) -> list[list[list[int]]]:
    """The tokens that vLLM writes behind each prompt of each batch, in a process of its own.

    Raises:
        RuntimeError: if it fails, with its last lines.
    """
    command = [sys.executable, __file__]
    run = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    if run.returncode:
        raise RuntimeError("\n".join(run.stderr.splitlines()[-40:]))
    answers: list[list[list[int]]] = json.loads(run.stdout.splitlines()[-1])
    return answers


def answer_stdin() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    model = LLM(request["folder"], dtype="float32", max_model_len=128, **request["options"])
    greedy = SamplingParams(temperature=0, min_tokens=request["tokens"], max_tokens=request["tokens"])
    answers = [
        [
            list(reply.outputs[0].token_ids)
            for reply in model.generate([{"prompt_token_ids": ids} for ids in batch], greedy, use_tqdm=False)
        ]
        for batch in request["prompts"]
    ]
    sys.stdout.write(f"{json.dumps(answers)}\n")


if __name__ == "__main__":
    answer_stdin()
