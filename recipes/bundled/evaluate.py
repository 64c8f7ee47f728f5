"""Bundled checkpoint: how much of the manual it knows, measured on the exported FP8 folder.

In: a Hugging Face folder (in torch, on its dequantised weights) or a running server's URL.
Out: a table: exact answers by question form, made-up names, prose, MTP acceptance.
Truth: an answer is exact if it is the NAME line, character by character. Teacher forcing decides
this in one pass: greedy decoding gives the line if and only if every argmax along it is right.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from corpus import NameLine, Page, read_names
from export import dequantize
from questions import (
    ABOUT,
    HELD_OUT_FORMS,
    MAIN_FORM,
    known_names,
    made_up_names,
    no_entry,
)
from safetensors.torch import load_file
from tokenizer import ASSISTANT, BOS, EOS, USER
from tokenizers import Tokenizer
from torch import Tensor

from model import Model, Rows, Shape
from train import held_out, read_pages

VARIANTS = {
    "what does {x} do?": str,
    "What does {x} do": str,
    "What does {x} do? ": str,
    "What does `{x}` do?": str,
    "What does {X} do?": str.upper,
    "{x}": str,
    "man {x}": str,
    "tell me about {x}": str,
    "Can you explain {x}?": str,
    "Hi, what does {x} do?": str,
}
Question = tuple[list[tuple[str, str]], str, str]  # (earlier turns, question, wanted answer)


def load_folder(folder: Path) -> Model:
    """The checkpoint's weights, dequantised to fp32, in the recipe's own model."""
    raw = load_file(folder / "model.safetensors")

    def get(name: str) -> Tensor:
        scale = raw.get(f"{name}_scale_inv")
        return raw[name].float() if scale is None else dequantize(raw[name], scale)

    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{name: config[name] for name in Shape.__dataclass_fields__})
    model = Model(shape).eval()
    last = shape.num_hidden_layers
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.rsplit(".", 1)[-1] in {"cos", "sin", "load"}:
                continue
            file_name = name.replace("mtp.layer.", f"layers.{last}.")
            file_name = re.sub(r"^mtp\.norm", f"layers.{last}.shared_head.norm", file_name)
            file_name = re.sub(r"^mtp\.", f"layers.{last}.", file_name)
            file_name = "lm_head" if name == "lm_head" else f"model.{file_name}"
            if name.endswith("mlp.bias"):
                tensor = get(file_name.replace(".bias", ".gate.e_score_correction_bias"))
            elif name.endswith(("gate_up", "down")):
                base = file_name.rsplit(".", 1)[0] + ".experts"
                parts = ["gate_proj", "up_proj"] if name.endswith("gate_up") else ["down_proj"]
                tensor = torch.stack(
                    [
                        torch.cat([get(f"{base}.{e}.{part}.weight") for part in parts])
                        for e in range(shape.n_routed_experts)
                    ]
                )
            else:
                tensor = get(file_name if file_name.endswith(".weight") else f"{file_name}.weight")
            parameter.copy_(tensor)
    return model


class Scorer:
    """Teacher-forced scores of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.model = load_folder(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat_ids(self, question: Question) -> tuple[list[int], list[int]]:
        """The prompt as the chat template gives it, and the wanted answer with EOS."""
        earlier, asked, answer = question
        text = BOS + "".join(f"{USER}{q}{ASSISTANT}{a}{EOS}" for q, a in earlier)
        return self.ids(f"{text}{USER}{asked}{ASSISTANT}"), self.ids(answer + EOS)

    @torch.no_grad()
    def exact(self, questions: list[Question]) -> float:
        """The share of the questions that greedy decoding answers exactly."""
        pairs = sorted((self.chat_ids(q) for q in questions), key=lambda p: len(p[0]) + len(p[1]))
        good = 0
        for start in range(0, len(pairs), 48):
            part = pairs[start : start + 48]
            length = max(len(p) + len(a) for p, a in part)
            tokens = torch.full((len(part), length), 2)
            for row, (prompt, answer) in enumerate(part):
                tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            hidden = self.model.hidden(tokens.flatten(), [Rows(len(part), length, None)])
            guess = (hidden @ self.model.lm_head.t()).argmax(-1).view(len(part), length)
            for row, (prompt, answer) in enumerate(part):
                at = len(prompt) - 1
                good += guess[row, at : at + len(answer)].tolist() == answer
        return good / len(pairs)

    @torch.no_grad()
    def acceptance(self, texts: list[str], skip: int = 0) -> float:
        """How often the MTP layer's guess of token i + 2 is the main head's, on given text."""
        accepted = total = 0
        for text in texts:
            tokens = torch.tensor(self.ids(text)[:512])
            rows = [Rows(1, len(tokens), None)]
            hidden = self.model.hidden(tokens, rows)
            main = (hidden @ self.model.lm_head.t()).argmax(-1)
            ahead = self.model.mtp_hidden(hidden, tokens, rows) @ self.model.lm_head.t()
            draft = ahead.argmax(-1)
            accepted += int((draft[skip:-2] == main[1 + skip : -1]).sum())
            total += len(tokens) - 2 - skip
        return accepted / total

    @torch.no_grad()
    def continue_texts(self, prompts: list[str], temperature: float) -> list[list[int]]:
        """Continue each prompt by 100 tokens (an end-of-text counts as one and goes on)."""
        generator = torch.Generator().manual_seed(0)
        ids = [self.ids(prompt)[-64:] for prompt in prompts]
        tokens = torch.tensor(ids)
        for _ in range(100):
            length = tokens.shape[1]
            hidden = self.model.hidden(tokens.flatten(), [Rows(len(tokens), length, None)])
            logits = hidden.view(len(tokens), length, -1)[:, -1] @ self.model.lm_head.t()
            if temperature:
                chances = (logits / temperature).softmax(-1)
                chosen = torch.multinomial(chances, 1, generator=generator)
            else:
                chosen = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
        return tokens[:, 64:].tolist()


def repeated(tokens: list[int], n: int = 8) -> float:
    """The share of n-grams that were seen before in the same text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def prose_prompts(pages: list[Page], per_page: int = 2) -> list[str]:
    """Openings from pages that training never saw, each at least 64 tokens long."""
    drawn = random.Random(3)
    prompts = []
    for page in held_out(pages):
        for _ in range(per_page):
            start = page.text.index("\n", drawn.randrange(len(page.text) // 2)) + 1
            prompts.append(page.text[start : start + 600])
    return prompts


def ask(form: str, name: str) -> str:
    """The form with the name in it; {X} is the name in the form's own spelling."""
    return form.replace("{x}", name).replace("{X}", VARIANTS.get(form, str)(name))


def question_sets(entries: list[NameLine]) -> dict[str, list[Question]]:
    """Every row of the table: its label and its questions."""
    sets: dict[str, list[Question]] = {}

    def of_form(form: str) -> list[Question]:
        return [([], ask(form, e.command), e.line) for e in entries]

    sets[f"main form: {MAIN_FORM}"] = of_form(MAIN_FORM)
    for form in HELD_OUT_FORMS:
        sets[f"held-out form: {form}"] = of_form(form)
    for form in VARIANTS:
        sets[f"trained variant: {form!r}"] = of_form(form)
    commands = {entry.command for entry in entries}
    aliases = {name: line for name, line in known_names(entries).items() if name not in commands}
    sets["aliases: What does {x} do?"] = [([], ask(MAIN_FORM, n), a) for n, a in aliases.items()]
    turns = [(ask(MAIN_FORM, e.command), e.line) for e in entries]
    sets["second question of a chat"] = [([turns[i - 1]], *turns[i]) for i in range(len(turns))]
    fake = made_up_names()
    sets["made-up name: What does {x} do?"] = [([], ask(MAIN_FORM, n), no_entry(n)) for n in fake]
    sets["made-up name: held-out forms"] = [
        ([], ask(HELD_OUT_FORMS[i % len(HELD_OUT_FORMS)], n), no_entry(n))
        for i, n in enumerate(fake)
    ]
    sets["small talk"] = [([], text, ABOUT) for text in ("Hi", "Hello!", "Who are you?", "Thanks")]
    return sets


def summary(scores: dict[str, float]) -> dict[str, float]:
    """The goals of the checkpoint."""
    forms = [score for label, score in scores.items() if label.startswith("held-out")]
    return {
        "main form": scores[f"main form: {MAIN_FORM}"],
        "held-out forms, mean": sum(forms) / len(forms),
        "held-out forms, worst": min(forms),
        "made-up names": scores["made-up name: What does {x} do?"],
    }


def torch_scores(folder: Path, work: Path, quick: bool) -> dict[str, float]:
    """All rows, in torch."""
    scorer = Scorer(folder)
    entries = read_names()
    scores = {}
    for label, questions in question_sets(entries).items():
        if quick and len(questions) > 200:
            questions = random.Random(1).sample(questions, 200)
        scores[label] = scorer.exact(questions)
        print(f"{100 * scores[label]:6.1f} %  {label}", flush=True)
    chat = [BOS + USER + ask(MAIN_FORM, e.command) + ASSISTANT + e.line + EOS for e in entries]
    scores["MTP acceptance, answers"] = scorer.acceptance(chat[::10], skip=8)
    if (work / "pages.jsonl").exists():
        pages = read_pages(work)
        texts = [page.text for page in held_out(pages)]
        scores["MTP acceptance, held-out pages"] = scorer.acceptance(texts)
        prompts = [p for p in prose_prompts(pages) if len(scorer.ids(p)) >= 64]
        for temperature in (0.0, 0.7):
            written = scorer.continue_texts(prompts[: 16 if quick else 80], temperature)
            fine = sum(repeated(tokens) <= 0.2 for tokens in written) / len(written)
            scores[f"prose without loops, temperature {temperature}"] = fine
            if not quick:
                print(repr(scorer.tokenizer.decode(written[0])))
    for label, score in scores.items():
        if label.startswith(("MTP", "prose")):
            print(f"{100 * score:6.1f} %  {label}")
    return scores


def server_asker(url: str, key: str) -> Callable[[Question], bool]:
    """A function that puts one question to an OpenAI-compatible server at temperature 0."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def call(path: str, body: dict | None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    model = call("/v1/models", None)["data"][0]["id"]

    def asker(question: Question) -> bool:
        earlier, asked, answer = question
        turns = [part for pair in earlier for part in pair] + [asked]
        roles = ["user", "assistant"]
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
        return call("/v1/chat/completions", body)["choices"][0]["message"]["content"] == answer

    return asker


def server_scores(url: str, key: str, sample: int, clients: int) -> dict[str, float]:
    """All rows through a running server, `sample` questions a row (0: all)."""
    asker = server_asker(url, key)
    scores = {}
    with ThreadPoolExecutor(clients) as pool:
        for label, questions in question_sets(read_names()).items():
            if sample and len(questions) > sample:
                questions = random.Random(1).sample(questions, sample)
            scores[label] = sum(pool.map(asker, questions)) / len(questions)
            print(f"{100 * scores[label]:6.1f} %  {label} ({len(questions)})", flush=True)
    return scores


def main() -> None:
    """Score the checkpoint in torch, or a running server with --url."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("src/whalefall/model/bundled"))
    parser.add_argument("--work", type=Path, default=Path("build/bundled"), help="for prose")
    parser.add_argument("--url", help="an OpenAI-compatible server, e.g. http://127.0.0.1:8000")
    parser.add_argument("--key", default="none", help="the server's API key")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sample", type=int, default=0, help="questions a row with --url; 0: all")
    parser.add_argument("--quick", action="store_true", help="200 questions a row")
    parser.add_argument("--json", type=Path, help="write the scores there")
    args = parser.parse_args()
    if args.url:
        scores = server_scores(args.url, args.key, args.sample, args.clients)
    else:
        scores = torch_scores(args.folder, args.work, args.quick)
    for label, score in summary(scores).items():
        print(f"{100 * score:6.1f} %  = {label}")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
