"""Day 6, the inference system: prefill and decode units as processes, one of them killed."""

import contextlib
import os
import signal

from whalefall import LLM, SamplingParams
from whalefall.serve.commands import bundled_path
from whalefall.serve.units import Gateway, UnitsConfig, parse_layout

ENGINE = {"num_blocks": 64, "max_sequences": 8}
PARAMS = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=1)


def main() -> None:
    llm = LLM(bundled_path(), **ENGINE)
    names = ("tar", "ls", "mount", "find")
    chats = [[{"role": "user", "content": f"What does {name} do?"}] for name in names]
    prompts = [llm.tokenizer.apply_chat_template(chat) for chat in chats]
    alone = {i: llm.generate([prompt], PARAMS)[0] for i, prompt in enumerate(prompts)}

    layout = UnitsConfig(parse_layout("1x2", "--prefill"), parse_layout("2x2", "--decode"), ENGINE)
    with contextlib.closing(Gateway(bundled_path(), layout)) as gateway:
        for i, prompt in enumerate(prompts):
            gateway.add(f"{i}", prompt, PARAMS)
        tokens = {i: [] for i in alone}
        logprobs = {i: [] for i in alone}
        killed = False
        while gateway.has_work():
            for delta in gateway.step():
                tokens[int(delta.request_id)] += delta.token_ids
                logprobs[int(delta.request_id)] += delta.logprobs or []
            if not killed and sum(map(len, tokens.values())) > 40:
                unit = next(u for u in gateway.fleet.units.values() if u.kind == "decode")
                os.kill(unit.pids[0], signal.SIGKILL)
                killed = True
        stats = gateway.unit_stats().items()
        print("units lost on the way:", gateway.fleet.restarts)
        print("same tokens:", tokens == {i: out.token_ids for i, out in alone.items()})
        print("same logprobs, bit for bit:", logprobs == {i: o.logprobs for i, o in alone.items()})
        prompted = sum(s.prompt_tokens for place, s in stats if place.unit.startswith("decode"))
        print("prompt tokens that decode units computed:", prompted)
    print(llm.tokenizer.decode(alone[0].token_ids)[:26])


if __name__ == "__main__":
    main()
