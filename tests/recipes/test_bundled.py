"""The bundled checkpoint and its recipe: format, lists, and a sample of what it knows."""

import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "bundled"
FOLDER = ROOT / "src" / "whalefall" / "model" / "bundled"


@pytest.fixture(scope="module")
def recipe():
    """Imports a module of the recipe, which is a folder of scripts."""
    mine = {path.stem for path in RECIPE.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in mine & set(sys.modules)}
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module
    sys.path.remove(str(RECIPE))
    for name in mine:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture(scope="module")
def tensors():
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_checkpoint_fits_the_repository():
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000


def test_types_are_as_published(tensors):
    linears = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    linears += ("gate_proj", "up_proj", "down_proj")
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_scale_inv":
            rows, columns = tensors[f"{module}.weight"].shape
            assert (tensor.dtype, tensor.shape) == (
                torch.float32,
                (-(-rows // 128), -(-columns // 128)),
            )
        elif kind == "e_score_correction_bias":
            assert tensor.dtype == torch.float32
        elif module.endswith(linears):
            assert tensor.dtype == torch.float8_e4m3fn
            assert f"{module}.weight_scale_inv" in tensors
        else:
            assert tensor.dtype == torch.bfloat16


def test_the_mtp_layer_keeps_copies_of_embedding_and_head(tensors):
    layer = json.loads((FOLDER / "config.json").read_text())["num_hidden_layers"]
    copies = {"embed_tokens.weight": "model.embed_tokens.weight"}
    copies["shared_head.head.weight"] = "lm_head.weight"
    for copy, original in copies.items():
        assert torch.equal(tensors[f"model.layers.{layer}.{copy}"], tensors[original])


def test_quantisation_is_within_half_a_step_of_e4m3(recipe):
    export = recipe("export")
    weight = torch.randn(160, 256, generator=torch.Generator().manual_seed(0))
    weight[130:, 200:] *= 100
    quantized, scale = export.quantize(weight)
    assert scale.shape == (2, 2)
    error = (export.dequantize(quantized, scale) - weight).abs()
    wide = scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
    # half of the last of 3 mantissa bits, or of the smallest subnormal step
    assert (error <= torch.maximum(weight.abs() / 16, wide * 2**-10) * 1.0001).all()


def test_the_list_of_name_lines_is_well_formed(recipe):
    corpus = recipe("corpus")
    assert corpus.check() == []
    assert len(corpus.read_names()) >= 900


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("tar - an archiving utility", None),
        ("tar an archiving utility", "no ' - '"),
        ("gtar - an archiving utility", "not among"),
        ("tar - short", "6 to 100"),
        ("tar, - an archiving utility", "of the form"),
        ("tar - an \\fBarchiving utility", "backslash"),
    ],
)
def test_the_checker_finds_bad_lines(recipe, line, complaint):
    corpus = recipe("corpus")
    found = corpus.complaint(corpus.NameLine("tar", "1", "tar", line))
    assert found is None if complaint is None else complaint in found


def test_held_out_forms_and_names_are_never_trained(recipe):
    questions = recipe("questions")
    entries = recipe("corpus").read_names()
    conversations = questions.Conversations(entries, ["apple", "house"], seed=3)
    forms = {conversations.form().lower() for _ in range(5000)}
    assert not forms & {form.lower() for form in questions.HELD_OUT_FORMS}
    made_up = set(questions.made_up_names())
    assert not made_up & set(questions.known_names(entries))
    assert not {conversations.made_up() for _ in range(5000)} & made_up


def test_asciidoctors_preamble_is_left_out_of_the_text(recipe):
    source = """.ie \\n(.g .ds Aq \\(aq
.el       .ds Aq '
.de URL
\\fI\\\\$2\\fP <\\\\$1>\\\\$3
..
.if \\n[.g] \\{\\
.  mso www.tmac
.  am URL
.    ad l
.  .
.  LINKSTYLE blue R < >
.\\}
.SH "NAME"
choom \\- display and adjust OOM\\-killer score.
.SH "DESCRIPTION"
The \\fBchoom\\fP command
"""
    wanted = (
        "NAME\n\nchoom - display and adjust OOM-killer score.\n\nDESCRIPTION\n\nThe choom command\n"
    )
    assert recipe("roff").plain(source) == wanted


def test_the_chat_template_is_the_trained_form(recipe):
    from jinja2 import Template

    tokenizer = recipe("tokenizer")
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    text = Template(config["chat_template"]).render(
        messages=messages, add_generation_prompt=True, bos_token=tokenizer.BOS,
        eos_token=tokenizer.EOS,
    )  # fmt: skip
    user, assistant = tokenizer.USER, tokenizer.ASSISTANT
    assert text == (
        f"{tokenizer.BOS}Be brief.{user}q1{assistant}a1{tokenizer.EOS}{user}q2{assistant}"
    )


def test_a_sample_of_commands_is_answered_exactly(recipe):
    evaluate = recipe("evaluate")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scorer = evaluate.Scorer(FOLDER)
    entries = random.Random(5).sample(evaluate.read_names(), 60)
    score = scorer.exact(
        [([], evaluate.ask(evaluate.MAIN_FORM, e.command), e.line) for e in entries]
    )
    wrong = scorer.exact([([], evaluate.ask(evaluate.MAIN_FORM, "tar"), "tar - a tape")])
    torch.set_num_threads(threads)
    assert score >= 0.85
    assert wrong == 0.0


def test_packed_rows_hide_other_conversations(recipe):
    train = recipe("train")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    document = torch.tensor([[0, 0, 0, 1, 1]])
    learnt = torch.tensor([[False, False, True, False, True]])
    assert train._shifted(ids, document, learnt, 1).tolist() == [[-1, 7, -1, 9, -1]]
    assert train._shifted(ids, document, learnt, 2).tolist() == [[7, -1, -1, -1, -1]]
    assert np.isclose(train.learning_rate(1.0, 9999, 1.0), 0.02)
