"""The prefix cache on disk: found again after a restart, the same bits, and never in the way."""

import errno
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.engine import LLM, Engine, EngineConfig, SamplingParams
from whalefall.engine.core import BlockManager, Sequence
from whalefall.engine.core.block_manager import block_hash
from whalefall.engine.disk_prefix import fingerprint
from whalefall.errors import ConfigError
from whalefall.model.synth import synth

PROMPT = [5 + 7 * i % 250 for i in range(300)]
PARAMS = SamplingParams(max_tokens=8, temperature=0, logprobs=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return synth(tmp_path_factory.mktemp("model"), "tiny")


def llm(model: Path, folder: Path | str = "", **settings) -> LLM:
    return LLM(model, num_blocks=32, strict_prefix=True, prefix_cache=str(folder), **settings)


def answer(served: LLM, prompt: list[int] = PROMPT, params: SamplingParams = PARAMS):
    out = served.generate([prompt], params)[0]
    if served.engine._disk is not None:
        served.engine._disk.flush()
    return (out.token_ids, out.logprobs), out.num_cached_tokens


def test_a_prompt_is_found_after_a_restart_and_changes_no_bit(model, tmp_path) -> None:
    right, _ = answer(llm(model))
    assert answer(llm(model, tmp_path)) == (right, 0)
    again = llm(model, tmp_path)
    assert answer(again) == (right, 256)
    assert again.engine.stats().disk_hits == 256
    assert answer(again) == (right, 256)  # from memory now
    assert again.engine.stats().disk_hits == 256


def test_a_longer_prompt_takes_what_there_is_and_adds_the_rest(model, tmp_path) -> None:
    longer = [*PROMPT, *range(5, 150)]
    right, _ = answer(llm(model), longer)
    answer(llm(model, tmp_path))
    assert answer(llm(model, tmp_path), longer) == (right, 256)
    assert answer(llm(model, tmp_path), longer) == (right, 384)


def test_an_engine_sees_what_another_one_wrote_meanwhile(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("whalefall.engine.disk_prefix.REFRESH_S", 0.0)
    first, second = llm(model, tmp_path), llm(model, tmp_path)
    right, _ = answer(first)
    assert answer(second) == (right, 256)


def test_other_weights_computes_and_salts_share_nothing(model, tmp_path) -> None:
    answer(llm(model, tmp_path))
    other = synth(tmp_path / "other", "tiny", seed=1)
    assert answer(llm(other, tmp_path))[1] == 0
    assert answer(llm(model, tmp_path, compute="w8a8"))[1] == 0
    assert answer(llm(model, tmp_path, kv="fp32"))[1] == 0
    served = Engine(model, EngineConfig(num_blocks=32, prefix_cache=str(tmp_path)))
    served.add("salted", PROMPT, PARAMS, cache_salt="mine")
    while served.has_work():
        assert all(delta.num_cached_tokens == 0 for delta in served.step())


def test_the_fingerprint_sees_weights_of_the_same_shape(model, tmp_path) -> None:
    other = synth(tmp_path, "tiny", seed=1)
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(model) == fingerprint(model)
    assert fingerprint(model, "bf16") != fingerprint(model, "fp32")


def test_damaged_and_lost_files_are_computed_again(model, tmp_path, caplog) -> None:
    right, _ = answer(llm(model, tmp_path))
    served = llm(model, tmp_path)
    for path in tmp_path.rglob("*.kv"):
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
    assert answer(served) == (right, 192)  # the last block was damaged
    assert served.engine.stats().disk_failures == 1
    assert answer(served)[0] == right
    assert served.engine.stats().disk_failures == 1
    assert caplog.text.count("a block is damaged") == 1
    served = llm(model, tmp_path)
    shutil.rmtree(tmp_path)
    assert answer(served) == (right, 0)
    assert "a block is damaged" not in caplog.text.partition("a block is damaged")[2]
    assert answer(served, PROMPT[::-1])[1] == 0


@pytest.mark.parametrize("known", [False, True])
def test_cut_files_are_counted_said_and_written_again(model, tmp_path, caplog, known) -> None:
    right, _ = answer(llm(model, tmp_path))
    served = llm(model, tmp_path) if known else None
    for path in tmp_path.rglob("*.kv"):
        path.write_bytes(b"7 bytes")
    served = served or llm(model, tmp_path)
    assert answer(served) == (right, 0)
    assert served.engine.stats().disk_failures == (4 if known else 1)
    assert caplog.text.count("a block is damaged") == 1
    assert len(list(tmp_path.rglob("*.kv"))) == 1
    again = llm(model, tmp_path)
    assert answer(again) == (right, 256)
    assert again.engine.stats().disk_failures == 0


def test_a_full_disk_fails_no_request_and_leaves_no_half_file(model, tmp_path, monkeypatch) -> None:
    served = llm(model, tmp_path)
    right, _ = answer(llm(model))
    real = served.engine._disk._store.fs.open

    def full(path, mode):
        file = real(path, mode)
        if mode == "wb":
            file.write(b"some of it")
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(type(served.engine._disk._store.fs), "open", lambda self, *a: full(*a))
    assert answer(served) == (right, 0)
    assert served.engine.stats().disk_failures == 1
    assert not list(tmp_path.rglob("*.kv*"))
    assert answer(served, [9] * 200)[1] == 0  # writing pauses
    assert served.engine.stats().disk_failures == 1


def test_a_place_that_cannot_be_used_is_said_at_the_start(model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"kv_cache: .* cannot be used"):
        llm(model, tmp_path / "file")


def test_a_request_cancelled_while_the_disk_reads_leaves_nothing(model, tmp_path) -> None:
    answer(llm(model, tmp_path))
    engine = llm(model, tmp_path).engine
    engine.add("a", PROMPT, PARAMS)
    engine.cancel("a")
    assert [d.finish_reason for d in engine.step()] == ["cancelled"]
    assert not engine.has_work() and not engine._disk.is_fetching
    assert engine.stats().kv_used == 0


def test_the_disk_stays_below_its_limit(model, tmp_path) -> None:
    served = llm(model, tmp_path, prefix_cache_bytes=300_000)
    for start in range(6):
        answer(served, [start + 5, *PROMPT])
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) < 320_000


@given(st.data())
def test_adopted_blocks_keep_the_books_and_push_out_no_part_of_their_chain(data) -> None:
    manager, draw = BlockManager(data.draw(st.integers(1, 12))), data.draw
    used: list[Sequence] = []
    for number in range(draw(st.integers(0, 4))):  # some blocks in use, some cached, some fresh
        seq = Sequence(f"{number}", [number] * 64 * draw(st.integers(1, 4)), 1 << 20)
        if manager.grow(seq, len(seq.tokens)):
            seq.num_computed = len(seq.tokens)
            manager.register(seq)
            used.append(seq)
            if draw(st.booleans()):
                manager.free(used.pop())
    hashes: list[bytes] = []
    for _ in range(draw(st.integers(0, 12))):
        hashes.append(block_hash(hashes[-1] if hashes else b"", [0] * 64))
    before = [own for own in hashes if manager.knows(own)]
    adopted = manager.adopt(hashes)
    assert manager.broken_invariants(used) == []
    assert all(manager.knows(own) for own in before)
    known = [manager.knows(own) for own in hashes]
    assert known == sorted(known, reverse=True)  # a chain from its head on
    assert len(adopted) == sum(known) - len(before)
