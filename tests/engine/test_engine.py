"""What a request gets: stops, limits, counts, cancellation, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model.forms import FORMS
from whalefall.engine import LLM, Delta, Engine, EngineConfig, RequestOutput, SamplingParams
from whalefall.errors import ConfigError, CorruptError, LimitError, MissingError, UnsupportedError
from whalefall.model.synth import synth

PROMPT = np.random.default_rng(0).integers(4, 260, 70).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(tmp_path_factory.mktemp("model"), FORMS["v3"], seed=7)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_blocks=64)


def test_a_cache_beyond_the_address_space_is_refused_with_its_remedy(folder: Path) -> None:
    with pytest.raises(LimitError, match=r"GB, which the system does not grant; make it smaller"):
        Engine(folder, EngineConfig(kv_cache_bytes=1 << 47))


def answer(llm: LLM, **params: Any) -> RequestOutput:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    # byte-level tokens only, so that each has a text of its own
    bias = dict.fromkeys(range(200, 230), 100.0)
    return llm.generate([PROMPT], SamplingParams(**{**settings, "logit_bias": bias, **params}))[0]


def test_greedy_answer_is_the_argmax_of_a_fresh_prompt(folder: Path) -> None:
    llm = LLM(folder, compute="fp32")
    out = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0]
    logits = llm.logits(PROMPT + out.token_ids)
    assert out.token_ids == logits[len(PROMPT) - 1 : -1].argmax(axis=1).tolist()


def test_a_stop_string_ends_the_answer_and_is_left_out(llm: LLM) -> None:
    whole = answer(llm)
    stop = whole.text[6:9]
    cut = answer(llm, stop=[stop, "never"])
    assert (cut.finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    kept = answer(llm, stop=stop, include_stop_str_in_output=True)
    assert kept.text == cut.text + stop


def test_text_that_may_begin_a_stop_string_is_held_back_then_shown(llm: LLM) -> None:
    whole = answer(llm)
    assert answer(llm, stop=[whole.text[5:8] + "§"]).text == whole.text


def test_a_stop_id_ends_the_answer(llm: LLM) -> None:
    whole = answer(llm)
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    out = answer(llm, stop_token_ids=[token])
    assert (out.finish_reason, out.outputs[0].stop_reason) == ("stop", token)
    assert out.token_ids == whole.token_ids[: first + 1]
    later = answer(llm, stop_token_ids=[token], min_tokens=first + 3)
    assert token not in later.token_ids[: first + 3]


def test_eos_ends_the_answer_unless_ignored(llm: LLM) -> None:
    eos = llm.engine.model.eos_token_ids[0]
    out = answer(llm, ignore_eos=False, logit_bias={eos: 100.0})
    assert (out.token_ids, out.text, out.finish_reason) == ([eos], "", "stop")
    assert out.outputs[0].stop_reason is None
    out = answer(llm, ignore_eos=True, logit_bias={eos: 100.0}, max_tokens=3)
    assert (out.token_ids, out.finish_reason) == ([eos] * 3, "length")
    out = answer(llm, ignore_eos=False, logit_bias={eos: 100.0}, min_tokens=2)
    assert out.token_ids.index(eos) == 2


def test_n_answers_differ_by_index_and_share_the_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=10, ignore_eos=True)
    before = llm.engine.stats().prefix_hits
    out = llm.generate([PROMPT], params)[0]
    texts = [tuple(each.token_ids) for each in out.outputs]
    assert len(set(texts)) == 3
    assert llm.engine.stats().prefix_hits - before >= 2 * 64
    again = llm.generate([PROMPT], params)[0]
    assert [tuple(each.token_ids) for each in again.outputs] == texts


def test_text_equals_decoding_all_tokens(llm: LLM) -> None:
    assert llm.tokenizer is not None
    out = answer(llm, temperature=1.5, seed=1, logit_bias={}, max_tokens=60)
    assert out.text == llm.tokenizer.decode(out.token_ids)


def test_prompts_may_have_params_of_their_own(llm: LLM) -> None:
    short, long = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 9))
    both = llm.generate([PROMPT, PROMPT], [short, long])
    assert [out.token_ids for out in both] == [
        llm.generate([PROMPT], one)[0].token_ids for one in (short, long)
    ]
    for wrong in ([short], [short, 3], 0.5):
        with pytest.raises(ConfigError, match=r"generate: .*; pass one, or one a prompt"):
            llm.generate([PROMPT, PROMPT], wrong)  # type: ignore[arg-type]


def test_the_context_ends_an_answer(folder: Path) -> None:
    llm = LLM(folder, num_blocks=64, max_model_len=80)
    out = llm.generate([PROMPT], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert (len(out.token_ids), out.finish_reason) == (10, "length")
    with pytest.raises(LimitError, match="the prompt has 80 tokens, the context holds 80"):
        llm.generate([PROMPT + PROMPT[:10]])


def test_cancelling_frees_everything(folder: Path) -> None:
    engine = Engine(folder, EngineConfig(num_blocks=16))
    params = SamplingParams(n=2, max_tokens=50, ignore_eos=True)
    engine.add("a", PROMPT, params)
    engine.add("b", PROMPT, params)
    engine.step()
    engine.step()
    engine.cancel("a")
    engine.cancel("unknown")
    deltas = engine.step()
    assert [(d.index, d.finish_reason) for d in deltas if d.request_id == "a"] == [
        (0, "cancelled"),
        (1, "cancelled"),
    ]
    engine.cancel("b")
    engine.step()
    stats = engine.stats()
    assert not engine.has_work()
    assert (stats.running, stats.waiting, stats.kv_used) == (0, 0, 0)


def test_stats_count_tokens(folder: Path) -> None:
    engine = Engine(folder, EngineConfig(num_blocks=16))
    deltas: list[Delta] = []
    for name in ("a", "b"):
        engine.add(name, PROMPT, SamplingParams(max_tokens=4, ignore_eos=True))
        while engine.has_work():
            deltas += engine.step()
    stats = engine.stats()
    assert (stats.generated_tokens, stats.prompt_tokens) == (8, 70 + 70 - 64)
    assert (stats.prefix_queries, stats.prefix_hits) == (140, 64)
    assert [d.num_cached_tokens for d in deltas] == [0] * 4 + [64] * 4
    # every computed token chose top-k experts in each layer that has some
    assert stats.expert_load.sum(axis=1).tolist() == [0, *[(76 + 6) * 3] * 2]


def test_salts_keep_prefixes_apart(folder: Path) -> None:
    engine = Engine(folder, EngineConfig(num_blocks=16))
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        engine.add(name, PROMPT, SamplingParams(max_tokens=1), cache_salt=salt)
        while engine.has_work():
            engine.step()
    assert engine.stats().prefix_hits == 64


@pytest.mark.parametrize(
    ("tokens", "params", "says"),
    [
        ([], {}, "empty prompt"),
        ([3, -1], {}, "token -1, wanted 0 … 383"),
        ([3, 384], {}, "token 384, wanted 0 … 383"),
        ([3], {"logit_bias": {400: 1}}, "has 400, wanted 0 … 383"),
    ],
)
def test_bad_requests_are_refused(
    llm: LLM, tokens: list[int], params: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        llm.generate([tokens], SamplingParams(**params))
    assert not llm.engine.has_work()


def test_more_context_than_the_model_knows_is_refused(folder: Path) -> None:
    most = Engine(folder, EngineConfig(num_blocks=4)).model.max_position_embeddings
    Engine(folder, EngineConfig(num_blocks=4, max_model_len=most))
    with pytest.raises(ConfigError, match=f"{most + 1}, this model knows {most} positions"):
        Engine(folder, EngineConfig(num_blocks=4, max_model_len=most + 1))


def _break(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "no folder":
        (folder / "config.json").unlink()
    elif how == "architecture":
        config["model_type"] = "llama"
    elif how == "indexer":
        config["model_type"] = "deepseek_v32"
    elif how == "number":
        config["num_experts_per_tok"] = 9
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "header":
        weights.write_bytes(b"not a header" + weights.read_bytes())
    elif how == "no weights":
        weights.unlink()
    elif how == "shard":
        index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "shape":
        config["hidden_size"] = 97
    elif how == "layers":
        config["num_hidden_layers"] = 5
    elif how == "tokenizer":
        config["vocab_size"] = 100
    if how != "no folder":
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("no folder", MissingError, r"has no config\.json; wanted a Hugging Face checkpoint"),
        ("architecture", UnsupportedError, r"model_type 'llama' .*wanted one of deepseek_v2"),
        ("indexer", UnsupportedError, "whalefall lacks the sparse indexer of V3.2"),
        ("number", ConfigError, "num_experts_per_tok is 9, wanted 1 to 8"),
        ("truncated", CorruptError, r"truncated: .* ends at byte \d+, the file at \d+"),
        ("header", CorruptError, "header of .* download the file again"),
        ("no weights", MissingError, r"has no model\.safetensors or shards"),
        ("shard", MissingError, r"no file .*model-00002-of-00002\.safetensors"),
        ("shape", ValueError, r"model\.embed_tokens\.weight is \[384, 96\], wanted \[384, 97\]"),
        ("layers", MissingError, r"no tensor model\.layers\.3.*; a shard is missing\?"),
        ("tokenizer", ValueError, r"wanted \[100, 96\]|the tokenizer of .* has 260 ids, the model"),
    ],
)
def test_a_broken_checkpoint_gets_one_clear_line(
    tmp_path: Path, how: str, error: type[Exception], says: str
) -> None:
    folder = synth(tmp_path / "model", {**FORMS["v3"], "num_nextn_predict_layers": 0}, seed=7)
    _break(folder, how)
    with pytest.raises(error, match=says) as caught:
        LLM(folder)
    assert "\n" not in str(caught.value)
