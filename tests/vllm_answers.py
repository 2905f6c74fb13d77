"""What vLLM answers, as a script: JSON requests on standard input, answers as the last line of standard output.

Each request has the `folder` of a model, `options` of `vllm.LLM`, batches of `prompts` (token ids), of which each is
asked after the one before it, and how many `tokens` are to be written, greedily, the end token held back.
"""

import json
import os
import subprocess
import sys
from typing import Any

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


Answers = list[list[list[int]]]  # the tokens behind each prompt of each batch


def run_vllm(requests: list[dict[str, Any]]) -> list[Answers]:
    """What vLLM writes for each request, in a process of its own.

    Raises:
        RuntimeError: if it fails, with its last lines.
    """
    command = [sys.executable, __file__]
    run = subprocess.run(
        command, input=json.dumps(requests), capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    if run.returncode:
        raise RuntimeError("\n".join(run.stderr.splitlines()[-40:]))
    answers: list[Answers] = json.loads(run.stdout.splitlines()[-1])
    return answers


def answer_request(request: dict[str, Any]) -> Answers:
    from vllm import LLM, SamplingParams

    model = LLM(request["folder"], dtype="float32", max_model_len=128, **request["options"])
    greedy = SamplingParams(temperature=0, min_tokens=request["tokens"], max_tokens=request["tokens"])
    return [
        [
            list(reply.outputs[0].token_ids)
            for reply in model.generate([{"prompt_token_ids": ids} for ids in batch], greedy, use_tqdm=False)
        ]
        for batch in request["prompts"]
    ]


if __name__ == "__main__":
    found = [answer_request(each) for each in json.load(sys.stdin)]
    sys.stdout.write(f"{json.dumps(found)}\n")
