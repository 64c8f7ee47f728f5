"""The inference system: eight requests share batches and a prefix, and one answer is the same."""

from whalefall import LLM, SamplingParams
from whalefall.serve.commands import bundled_path

llm = LLM(bundled_path(), num_blocks=64)
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
page = "NAME tar - an archiving utility. " * 12
prompts = [page + question for question in ("SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO")]

alone = llm.generate([prompts[0]], greedy)[0]
print("cached tokens of the first request:", alone.num_cached_tokens)
together = llm.generate(prompts, greedy)
print("the next ones hit the prefix:", all(out.num_cached_tokens >= 64 for out in together))
print("same tokens alone and together:", alone.token_ids == together[0].token_ids)
print("same logprobs, bit for bit:", alone.logprobs == together[0].logprobs)

drawn = SamplingParams(n=3, seed=7, max_tokens=8, ignore_eos=True)
answers = llm.generate([prompts[1]], drawn)[0].outputs
again = llm.generate([prompts[1]], drawn)[0].outputs
print("three answers, repeatable:", [a.token_ids for a in answers] == [a.token_ids for a in again])
stats = llm.engine.stats()
print("blocks in use at the end:", stats.kv_used, "of", stats.kv_total)
