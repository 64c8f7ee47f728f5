"""One engine in one process, driven by lines: `python benchmarks/peers/engines.py NAME PATH`.

Each line is a JSON command, {"do": "decode", "batch": 8, "steps": 16} or {"do": "prefill",
"tokens": 512}; each answer is the seconds it took. All engines get the same token ids and answer
greedily; decode is timed without the prompts (32 tokens a sequence) that come before it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

PROMPT = 32
THREADS = 2


def tokens(seed: int, count: int) -> list[int]:
    """The ids that every engine gets."""
    return np.random.default_rng(seed).integers(2, 32000, count).tolist()


class Whalefall:
    """This package's engine, in this process."""

    def __init__(self, path: str) -> None:
        import whalefall
        from whalefall.engine import Engine, EngineConfig, SamplingParams

        self.engine = Engine(path, EngineConfig(kv_cache_bytes=256 << 20, max_batch_tokens=512))
        self.params = SamplingParams
        self.seed = 0
        self.version = whalefall.__version__

    def _add(self, name: str, length: int, steps: int) -> None:
        self.seed += 1  # fresh prompts: no prefix hits
        params = self.params(temperature=0, max_tokens=steps, ignore_eos=True)
        self.engine.add(name, tokens(self.seed, length), params)

    def prefill(self, count: int) -> float:
        self._add("p", count, 1)
        start = time.perf_counter()
        while self.engine.has_work():
            self.engine.step()
        return time.perf_counter() - start

    def decode(self, batch: int, steps: int) -> float:
        for i in range(batch):
            self._add(f"d{i}", PROMPT, steps + 1)
        self.engine.step()
        start = time.perf_counter()
        while self.engine.has_work():
            self.engine.step()
        return time.perf_counter() - start


class IkLlama:
    """ik_llama.cpp through its C interface, flash attention and MLA mode as given."""

    def __init__(self, path: str, flash: bool, mla: int) -> None:
        from ik_llama_cpp import _ctypes_api as api

        self.api = api
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.mla = mla
        self.model = api.llama_model_load_from_file(path.encode(), model_params)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, 512, 512, 8
        params.n_threads = params.n_threads_batch = THREADS
        params.flash_attn, params.mla_attn = flash, mla
        params.fused_moe_up_gate = True
        self.context = api.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise SystemExit("ik_llama.cpp could not load the file")
        self.batch = api.llama_batch_init(512, 0, 8)
        self.version = version("ik-llama-cpp-python")

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, logits wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if self.api.llama_decode(self.context, batch):
            raise SystemExit("ik_llama.cpp: decode failed")

    def _best(self, row: int) -> int:
        pointer = self.api.llama_get_logits_ith(self.context, row)
        values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(values, (32768,)).argmax())

    def prefill(self, count: int) -> float:
        self.api.llama_kv_cache_clear(self.context)
        ids = tokens(1, count)
        start = time.perf_counter()
        self._decode([(t, i, 0, i == count - 1) for i, t in enumerate(ids)])
        self._best(count - 1)
        return time.perf_counter() - start

    def decode(self, batch: int, steps: int) -> float:
        self.api.llama_kv_cache_clear(self.context)
        now = []
        for s in range(batch):
            ids = tokens(s + 1, PROMPT)
            self._decode([(t, i, s, i == PROMPT - 1) for i, t in enumerate(ids)])
            now.append(self._best(PROMPT - 1))
        start = time.perf_counter()
        for step in range(steps):
            self._decode([(t, PROMPT + step, s, True) for s, t in enumerate(now)])
            now = [self._best(s) for s in range(batch)]
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp's server in this process; its own timings of prompt and answer."""

    def __init__(self, path: str) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 8192, 512, 512, 8
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.warmup = False
        params.fit_params = False
        self.server = xllamacpp.Server(params)
        self.version = version("xllamacpp")

    def _ask(self, ids: list[int], count: int) -> dict[str, Any]:
        request = {
            "prompt": ids,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = self.server.handle_completions(request)
        if "timings" not in answer:
            raise SystemExit(f"llama.cpp: {answer}")
        timings: dict[str, Any] = answer["timings"]
        return timings

    def prefill(self, count: int) -> float:
        return float(self._ask(tokens(1, count), 1)["prompt_ms"]) / 1e3

    def decode(self, batch: int, steps: int) -> float:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(batch) as pool:
            asked = [pool.submit(self._ask, tokens(s + 1, PROMPT), steps) for s in range(batch)]
            return max(float(each.result()["predicted_ms"]) for each in asked) / 1e3


class Transformers:
    """Transformers in BF16 on torch's CPU kernels; weights of its own: its FP8 wants a GPU."""

    def __init__(self, path: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch = torch
        config = transformers.AutoConfig.from_pretrained(path)
        del config.quantization_config
        with torch.device("meta"):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model.to_empty(device="cpu")
        noise = torch.randn(1 << 20) / 50  # a generator for each weight would take minutes
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            for part in tensor.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        rotary = self.model.model.rotary_emb
        self.model.model.rotary_emb = type(rotary)(config)
        self.version = transformers.__version__

    def _run(self, ids: list[list[int]], steps: int) -> float:
        with self.torch.no_grad():
            start = time.perf_counter()
            self.model.generate(
                self.torch.tensor(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False
            )
            return time.perf_counter() - start

    def prefill(self, count: int) -> float:
        return self._run([tokens(1, count)], 1)

    def decode(self, batch: int, steps: int) -> float:
        ids = [tokens(s + 1, PROMPT) for s in range(batch)]
        return self._run(ids, steps + 1) - self._run(ids, 1)


ENGINES: dict[str, Callable[[str], Any]] = {
    "whalefall": Whalefall,
    "ik fa1 mla3": lambda path: IkLlama(path, True, 3),
    "ik fa0 mla1": lambda path: IkLlama(path, False, 1),
    "ik fa1 mla1": lambda path: IkLlama(path, True, 1),
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def main() -> None:
    """Serve commands until standard input ends."""
    engine = ENGINES[sys.argv[1]](sys.argv[2])
    print(json.dumps({"ready": engine.version}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "prefill":
            seconds = engine.prefill(command["tokens"])
        else:
            seconds = engine.decode(command["batch"], command["steps"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
