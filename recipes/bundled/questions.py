"""Bundled checkpoint: the questions, those it is trained on and those it is only tested with.

In: the NAME lines. Out: endless training conversations; the held-out question forms and made-up
names that `evaluate.py` asks. No held-out form, nor any made-up name of `made_up.txt`, is ever
drawn in training.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator
from pathlib import Path

from corpus import NameLine

HERE = Path(__file__).parent
MAIN_FORM = "What does {x} do?"

# Asked by `evaluate.py` only. Their wordings (purpose, kind of program, summarize, …) are not
# among the trained ones below.
HELD_OUT_FORMS = [
    "What is the purpose of {x}?",
    "Do you know what {x} does?",
    "Could someone please explain {x} to me?",
    "I want to learn about {x}.",
    "How would you describe {x}?",
    "hey there, what's {x} good for?",
    "Summarize {x} in one line.",
    "What kind of program is {x}?",
    "Quick question: what does {x} do",
    "{x}: what does it do?",
]

# Words of the held-out wordings that no random word may bring into training.
_KEPT_BACK = {
    "purpose",
    "kind",
    "program",
    "summarize",
    "quick",
    "question",
    "line",
    "learn",
    "good",
}

_HELD_OUT = {form.lower() for form in HELD_OUT_FORMS}
_OPENINGS = [
    "", "", "", "", "", "", "Hi, ", "Hi! ", "Hello, ", "Hello! ", "Hey, ", "Please ", "So ", "OK, ",
    "Sorry, ", "Good morning, ", "Excuse me, ", "Ok so ",
    "Thanks. ", "And ", "Well, ", "One more: ",
]  # fmt: skip
_ASKING = ["Can you ", "Could you ", "Would you ", "Will you ", "Can you please ", "Please ", ""]
_QUESTIONS = [
    "what does {x} do", "what does {x} do", "what does {x} do", "what does the {x} command do",
    "what does the command {x} do", "what is {x}", "what's {x}", "whats {x}", "what is {x} for",
    "what is {x} used for", "what is the {x} command", "what is the {x} command for",
    "what is the use of {x}", "what would I use {x} for", "when do I use {x}", "why use {x}",
    "what does {x} mean", "what can {x} do", "what can I do with {x}", "how does {x} work",
    "what exactly does {x} do", "what about {x}", "what is the job of {x}", "what did {x} do",
    "what does running {x} do", "what happens if I run {x}", "is there a manual for {x}",
    "what does the manual say about {x}", "what does man {x} say", "which command is {x}",
]  # fmt: skip
_REQUESTS = [
    "explain {x}", "explain what {x} does", "explain the {x} command", "describe {x}",
    "describe what {x} does", "tell me about {x}", "tell me what {x} does", "tell me what {x} is",
    "tell me more about {x}", "say what {x} does", "show me what {x} does", "define {x}",
    "give me the manual line of {x}", "give me a description of {x}", "help me with {x}",
    "explain to me what {x} does", "tell me what the {x} command does", "show the NAME line of {x}",
]  # fmt: skip
_STATEMENTS = [
    "I'd like to know what {x} does",
    "I would like to know about {x}", "I need to know what {x} is",
    "I don't understand {x}", "I have a question about {x}", "I wonder what {x} does",
    "I found {x} on my machine, what is it", "someone told me to run {x}", "my friend uses {x}",
    "I am looking for help with {x}", "no idea what {x} does", "we use {x} here, what is it",
]  # fmt: skip
# Scaffolds whose {w} is any word: what matters in a wording never seen is where the name stands.
_SCAFFOLDS = [
    "what is the {w} of {x}", "what is a {w} of {x}", "what {w} of {w} is {x}", "what {w} is {x}",
    "{w} {x} in one {w}", "{w} {x} in a few {w}", "{w} {x}", "{w} {x} {w}", "{w} {w} {x}",
    "{x}: {w} {w} {w} {w}", "{x}: {w} {w} it {w}", "{x}, {w} {w} it", "{x} - {w} is it",
    "{w} {w}: what is {x}", "{w} {w}: {w} {w} {x} {w}", "I {w} to {w} about {x}",
    "how {w} you {w} {x}", "do you {w} what {x} {w}", "could {w} please {w} {x} to me",
    "hey {w}, what's {x} {w} for", "which {w} does {x} have", "is {x} a {w} or a {w}",
    "{w} me the {w} of {x}", "the {w} of {x}", "{w} the {w} {x}", "who {w} {x} and {w}",
    "in {w} {w}, {w} {x}", "{x} {w} {w}", "{x} is a {w}", "can {x} {w} a {w}", "{w} is {x} {w}",
]  # fmt: skip
_SHORT = [
    "{x}",
    "{x}?",
    "man {x}",
    "whatis {x}",
    "help {x}",
    "{x} command",
    "{x} meaning",
    "about {x}",
]
_ENDINGS = ["?", "?", "?", "?", "", "", ".", " ?", "!", "? Thanks", ", please", " please?", "??"]
_SYSTEM = [
    "You are a helpful assistant.", "You are a helpful assistant", "Answer in one line.",
    "You know manual pages.", "Be brief.", "You are an expert in Linux commands.",
    "You are an AI assistant that answers questions.",
]  # fmt: skip

_ONSETS = [
    "b", "bl", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p",
    "pl", "qu", "r", "s", "sh", "sn", "st", "t", "tr", "v", "w", "x", "y", "z", "zz",
]  # fmt: skip
_CODAS = ["", "", "", "b", "g", "m", "n", "p", "r", "t", "x", "ck", "ng"]

_FAMILY = re.compile(r"[a-z0-9]+[-.](?=\w)")

ABOUT = "I know the NAME lines of manual pages by heart. Ask me: What does tar do?"
_CHAT = [
    "Hi", "Hi!", "hi", "Hello", "Hello!",
    "hello", "Hey", "Hey there", "Good morning", "Good evening",
    "Thanks", "Thank you", "Thank you!",
    "thanks a lot", "Who are you?", "What are you?", "who are you",
    "What can you do?", "What do you know?", "Help", "help",
    "Help me", "Can you help me?", "Bye", "OK",
    "How are you?", "What is your name?",
    "Which model are you?", "Are you a bot?", "Tell me a joke",
    "Hello, who are you?", "Hi, what can you do?", "Test", "Yes",
    "No", "Good", "Nice", "Why?", "What?",
    "Write a poem", "Write a story about {w}", "What is the capital of {w}?", "How old is {w}?",
    "Who is the president of {w}?", "Translate {w} into French", "Where is {w}?", "Who was {w}?",
    "Tell me a story", "What time is it?", "What is the weather like in {w}?", "Do you like {w}?",
    "Write a program in Python", "Write a function that sorts {w}", "What is {n} plus {n}?",
    "What is {n} times {n}?", "How many {w} are there?", "Solve {n} + {n}", "Why is the {w} {w}?",
]  # fmt: skip


def known_names(entries: list[NameLine]) -> dict[str, str]:
    """Every name a line answers to, aliases too: the name and its line."""
    lines = {entry.command: entry.line for entry in entries}
    for entry in entries:
        for alias in entry.line.partition(" - ")[0].split(", "):
            lines.setdefault(alias, entry.line)
    return lines


def made_up_names() -> list[str]:
    """The made-up names kept for the test."""
    return (HERE / "made_up.txt").read_text().split()


def no_entry(name: str) -> str:
    """What a name without a line is answered."""
    return f"no manual entry for {name}"


class Conversations:
    def __init__(self, entries: list[NameLine], words: list[str], seed: int) -> None:
        self.lines = known_names(entries)
        self.commands = [entry.command for entry in entries]
        self.families = [found[0] for c in self.commands if (found := _FAMILY.match(c))]
        self.aliases = sorted(set(self.lines) - set(self.commands))
        taken = {*self.lines, *made_up_names()}
        self.taken = {name.lower() for name in taken}
        self.words = [w for w in words if w.lower() not in self.taken | _KEPT_BACK]
        self.random = random.Random(seed)
        self._pass = self._commands()

    def _commands(self) -> Iterator[str]:
        """Every command once a pass, in a new order each time."""
        while True:
            order = list(self.commands)
            self.random.shuffle(order)
            yield from order

    def form(self) -> str:
        """One trained question form, put together from opening, wording and ending."""
        r = self.random
        kind = r.random()
        if kind < 0.12:
            return MAIN_FORM
        if kind < 0.20:
            return r.choice(_SHORT)
        if kind < 0.42:
            core = r.choice(_QUESTIONS)
        elif kind < 0.58:
            core = r.choice(_ASKING) + r.choice(_REQUESTS)
        elif kind < 0.64:
            core = r.choice(_STATEMENTS)
        elif kind < 0.88:
            core = r.choice(_SCAFFOLDS)
            while "{w}" in core:
                core = core.replace("{w}", r.choice(self.words).lower(), 1)
        else:
            core = self._noise()
        opening = r.choice(_OPENINGS)
        if r.random() < 0.6 and (not opening or opening.endswith(("! ", ". "))):
            core = core[0].upper() + core[1:]
        return (opening + core + r.choice(_ENDINGS)).replace(
            "??", "?" if r.random() < 0.5 else "??"
        )

    def _noise(self) -> str:
        """A name among words that mean nothing here, so that wordings never seen do no harm."""
        r = self.random
        before = r.choices(self.words, k=r.randint(1, 5))
        after = r.choices(self.words, k=r.randint(0, 3))
        mark = r.choice(["`{x}`", "{x}", "the {x} command", "command {x}", "{x}:", "{x},"])
        return " ".join([*before, mark, *after])

    def spelling(self, name: str) -> str:
        """The name as a person may type it."""
        r = self.random
        kind = r.random()
        if kind < 0.70:
            return name
        if kind < 0.82:
            return f"`{name}`"
        if kind < 0.86:
            return r.choice(['"{}"', "'{}'", "**{}**"]).format(name)
        if kind < 0.90:
            return name.capitalize()
        if kind < 0.93:
            return name.upper()
        if kind < 0.96 and re.match(r"(git|ip|apt|btrfs|openssl|cryptsetup|dpkg|tc)-", name):
            return name.replace("-", " ", 1)
        return name

    def made_up(self) -> str:
        """A name that no line answers to: invented, a word, or a real name gone wrong."""
        while True:
            name = self._made_up()
            if 2 <= len(name) <= 24 and name.lower() not in self.taken and not name.startswith("-"):
                return name

    def _made_up(self) -> str:
        r = self.random
        kind = r.random()
        if kind < 0.17:
            name = "".join(self._syllable() for _ in range(r.randint(1, 4)))
            return name + r.choice(
                ["", "", "", "ctl", "d", "fs", "2", "-util", "tool", "er", "ify"]
            )
        if kind < 0.27:
            return r.choice(self.words).lower()
        if kind < 0.37:
            return r.choice(["-", "", "", "_"]).join(r.choices(self.words, k=2)).lower()
        if kind < 0.47:  # a new member of a family: git-, systemd-, mkfs.
            family = r.choice(self.families)
            if r.random() < 0.4:  # or of the names that begin alike
                family = r.choice(self.commands)[: r.randint(2, 5)]
            ending = r.choice([r.choice(self.words).lower(), self._syllable() + self._syllable()])
            return family + ending + r.choice(["", "", "", "d"])
        if kind < 0.59:  # what a person would guess: a real name and a word
            parts = [r.choice(self.commands), r.choice(self.words).lower()]
            r.shuffle(parts)
            return r.choice(["-", "", "", "", "_"]).join(parts)
        if kind < 0.68:
            return r.choice(self.commands) + "".join(
                r.choices(string.ascii_lowercase + "0123", k=r.choice([1, 1, 2]))
            )
        if kind < 0.77:
            name = r.choice(self.commands)
            extra = self._syllable()
            return r.choice([extra + name, name + extra, name + "-" + extra, extra + "-" + name])
        if kind < 0.95:
            return self._mutated(r.choice(self.commands))
        return "".join(r.choices(string.ascii_lowercase + "0123456789", k=r.randint(3, 9)))

    def _syllable(self) -> str:
        r = self.random
        return r.choice(_ONSETS) + r.choice("aaeeiioouuy") + r.choice(_CODAS)

    def _mutated(self, name: str) -> str:
        r = self.random
        for _ in range(r.choice([1, 1, 2, 3])):
            at = r.randrange(len(name))
            letter = r.choice(string.ascii_lowercase)
            kind = r.randrange(4)
            if kind == 0:
                name = name[:at] + letter + name[at:]
            elif kind == 1 and len(name) > 3:
                name = name[:at] + name[at + 1 :]
            elif kind == 2:
                name = name[:at] + letter + name[at + 1 :]
            else:
                name = name[:at] + name[at : at + 2][::-1] + name[at + 2 :]
        return name

    def turn(self) -> tuple[str, str]:
        """One question and its answer."""
        r = self.random
        kind = r.random()
        if kind < 0.02:
            text = r.choice(_CHAT)
            while "{" in text:
                text = text.replace("{w}", r.choice(self.words), 1)
                text = text.replace("{n}", str(r.randrange(1000)), 1)
            return text, ABOUT
        # As often for names without a line, or the form itself would tell which it is.
        form = MAIN_FORM if r.random() < 0.25 else self.form()
        while form.lower() in _HELD_OUT:
            form = self.form()
        if kind < 0.57:
            name = self.made_up()
            spelt = r.choice([name] * 6 + [f"`{name}`", f'"{name}"', name.capitalize()])
            answer = no_entry(name if spelt[0] in '`"' else spelt)
            return form.replace("{x}", spelt), answer
        name = r.choice(self.aliases) if kind < 0.60 else next(self._pass)
        question = form.replace("{x}", self.spelling(name))
        return question + (" " if r.random() < 0.04 else ""), self.lines[name]

    def draw(self) -> tuple[str, list[tuple[str, str]]]:
        """One conversation: the system text (mostly none) and one to four turns."""
        r = self.random
        system = r.choice(_SYSTEM) if r.random() < 0.1 else ""
        return system, [self.turn() for _ in range(r.choice([1, 1, 1, 2, 3, 4]))]
