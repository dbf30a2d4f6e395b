"""Runs vLLM with our connector in the environment of `scripts/engines.sh vllm`, and obeys lines of JSON on stdin.

{"prompts": [[ids], ...], "tokens": n, "transfer": [kv_transfer_params or null, ...]}    answers, greedily
{"reset": true}                                                                   forget vLLM's own prefix cache
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    settings = json.loads(sys.argv[1])
    transfer = settings.pop("transfer", None)
    if transfer is not None:
        settings["kv_transfer_config"] = KVTransferConfig(**transfer)
    llm = LLM(enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=True, **settings)

    def answer(command: dict[str, Any]) -> Any:
        if command.get("reset"):
            return {"reset": llm.reset_prefix_cache()}
        wishes = command.get("transfer") or [None] * len(command["prompts"])
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=command["tokens"],
                ignore_eos=True,
                detokenize=False,
                extra_args=None if wish is None else {"kv_transfer_params": wish},
            )
            for wish in wishes
        ]
        begun_s = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in command["prompts"]], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begun_s
        return [
            {
                "ids": list(one.outputs[0].token_ids),
                "cached": one.num_cached_tokens,
                "report": (one.kv_transfer_params or {}).get("kvstream"),
                "seconds": seconds,
            }
            for one in outputs
        ]

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
