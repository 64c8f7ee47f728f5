"""Bundled checkpoint: the text of a manual page, from its roff source.

In: one page in `man` or `mdoc` macros. Out: lines of plain text, headings in capitals.
It is no typesetter: fonts, tables and layout are dropped, the words stay.
Source: groff_man(7), groff_mdoc(7), groff_char(7).
"""

from __future__ import annotations

import re

_CHARS = {
    "aq": "'", "dq": '"', "cq": "'", "oq": "'", "lq": '"', "rq": '"', "ha": "^", "ti": "~",
    "bu": "*", "em": "--", "en": "-", "hy": "-", "mi": "-", "rs": "\\", "ga": "`", "co": "(C)",
    "rg": "(R)", "tm": "(TM)", "ul": "_", "ba": "|", "br": "|", "lB": "[", "rB": "]", "la": "<",
    "ra": ">", "->": "->", "<-": "<-", "fm": "'", "mu": "x", "+-": "+-", "<=": "<=", ">=": ">=",
    "Aq": "'", "L\"": '"', "R\"": '"', "C`": "", "C'": "", "sl": "/", "at": "@", "sh": "#",
    "Do": "$", "**": "*", "pl": "+", "eq": "=", "lC": "{", "rC": "}", "bv": "|", "dg": "+",
}  # fmt: skip
_FONT = re.compile(r"\\f(\[[^\]]*\]|\(..|.)")
_SIZE = re.compile(r"\\s([+-]?\d|\[[^\]]*\]|\([+-]?\d\d)")
_CHAR = re.compile(r"\\\((..)|\\\[([^\]]+)\]")
_STRING = re.compile(r"\\\*(\[[^\]]*\]|\(..|.)")
_QUOTED_ESCAPE = re.compile(r"\\[hvwCDHLNSXxlboZ]'[^']*'")
_REGISTER = re.compile(r"\\n(\[[^\]]*\]|\(..|[+-]?.)")
_COLOUR = re.compile(r"\\[mMF](\[[^\]]*\]|\(..|.)")
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
# macros of man(7) whose arguments alternate fonts and join without blanks
_ALTERNATING = {"BR", "BI", "RB", "RI", "IB", "IR"}
_FONTS = {"B", "I", "SB", "SM", "R"}
_BREAKS = {"PP", "P", "LP", "br", "sp", "IP", "HP", "Pp", "RS", "RE", "Bl", "El", "Bd", "Ed", "TP"}
# mdoc: macros that are text, and what stands round their arguments
_MDOC_AROUND = {
    "Sq": ("'", "'"), "Ql": ("'", "'"), "Dq": ('"', '"'), "Pq": ("(", ")"), "Bq": ("[", "]"),
    "Op": ("[", "]"), "Aq": ("<", ">"), "Brq": ("{", "}"), "Qq": ('"', '"'),
}  # fmt: skip
_MDOC_PLAIN = {
    "Ar", "Cm", "Pa", "Ev", "Va", "Em", "Sy", "Li", "Ic", "Dv", "Er", "Fa", "Ft", "Vt", "Ad",
    "An", "Lk", "Mt", "Tn", "Rs", "Re", "No", "Ns", "Nd", "Fn", "In", "Cd", "Ms", "Nx", "Ox",
    "Bx", "Fx", "Ux", "At", "Dx", "St", "Ap", "Xc", "Xo", "Oo", "Oc", "Ta", "Sx", "Do", "Dc",
    "So", "Sc", "Po", "Pc", "Bo", "Bc", "Ao", "Ac", "%A", "%T", "%B", "%D", "%O", "%R",
}  # fmt: skip
_PUNCTUATION = set(".,;:?!()[]")


def unescape(text: str) -> str:
    """Drop roff's escapes from one line and put the characters they name."""
    text = re.sub(r'\\["#].*', "", text)
    text = text.replace("\\e", "\x00").replace("\\\\", "\x00").replace("\\E", "\x00")
    for pattern in (_FONT, _SIZE, _QUOTED_ESCAPE, _COLOUR):
        text = pattern.sub("", text)
    text = _STRING.sub(lambda m: _CHARS.get(m[1].strip("[("), ""), text)
    text = _CHAR.sub(lambda m: _CHARS.get(m[1] or m[2], ""), text)
    text = _REGISTER.sub("", text)
    text = text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\0", " ")
    text = re.sub(r"\\[&|^/,%:)cdut{}pra!?]", "", text).replace("\\'", "'").replace("\\`", "`")
    return text.replace("\\.", ".").replace("\x00", "\\")


def arguments(rest: str) -> list[str]:
    """Split a macro's arguments as roff does, double quotes grouping."""
    return [
        (quoted.replace('""', '"') if quoted or not bare else bare)
        for quoted, bare in _ARGUMENT.findall(rest)
    ]


def _body(source: str) -> list[str]:
    """The lines that are text or macro calls: definitions and conditionals are left out."""
    lines, depth, defining = [], 0, False
    for line in source.replace("\\\n", "").split("\n"):
        if defining:  # also `.  .`, which ends asciidoctor's nested `.am`
            defining = not re.match(r"[.']\s*\.\s*$", line)
            continue
        call = re.match(r"[.']\s*([A-Za-z%]\S*|\\[\"}])", line)
        if depth:
            depth += line.count("\\{") - line.count("\\}")
            if call and call[1] in {"de", "am", "de1", "am1", "ig"}:
                defining = True
            continue
        if call and call[1] in {"de", "am", "de1", "am1", "ig"}:
            defining = True
        elif call and call[1] in {"if", "ie", "el", "while"}:
            depth = max(0, line.count("\\{") - line.count("\\}"))
        else:
            lines.append(line)
    return lines


def _mdoc(macro: str, args: list[str], name: str) -> str:
    """One mdoc line as text; macros among the arguments are called, as mdoc does."""
    words, glue, i = [], False, 0
    queue = [macro, *args]
    closing: list[str] = []

    def put(word: str) -> None:
        nonlocal glue
        if words and (glue or (len(word) == 1 and word in ".,;:?!)]")):
            words[-1] += word
        else:
            words.append(word)
        glue = False

    while i < len(queue):
        word = queue[i]
        i += 1
        if word == "Nm":
            given = i < len(queue) and queue[i] not in _PUNCTUATION | {"Fl", "Ar", "Op", "Ns"}
            put(queue[i] if given else name)
            i += given
        elif word == "Fl":
            put("-" + (queue[i] if i < len(queue) and queue[i] not in _PUNCTUATION else ""))
            i += i < len(queue) and queue[i] not in _PUNCTUATION
        elif word == "Xr" and i + 1 < len(queue):
            put(f"{queue[i]}({queue[i + 1]})")
            i += 2
        elif word in _MDOC_AROUND:
            put(_MDOC_AROUND[word][0])
            closing.append(_MDOC_AROUND[word][1])
            glue = True
        elif word == "Ns":
            glue = True
        elif word not in _MDOC_PLAIN:
            put(unescape(word))
    for close in reversed(closing):
        glue = True
        put(close)
    return " ".join(words)


def plain(source: str) -> str:
    """Give the page's text: headings in capitals, one paragraph a line, blank lines between."""
    out: list[str] = []
    paragraph: list[str] = []
    name = ""
    literal = table = False

    def flush() -> None:
        text = re.sub(r"\s+", " ", " ".join(paragraph)).strip()
        if text:
            out.append(text)
        paragraph.clear()

    for line in _body(source):
        call = re.match(r"[.']\s*([A-Za-z%][A-Za-z0-9%]?[A-Za-z]?)(?:\s+(.*))?$", line)
        if line.startswith((".", "'")) and not call:
            continue
        if call:
            macro, args = call[1], arguments(call[2] or "")
            text = [unescape(a) for a in args]
            if macro == "TS":
                table = True
            elif macro == "TE":
                table = False
            elif macro in {"SH", "Sh", "SS", "Ss"}:
                flush()
                out.append("\n" + " ".join(text).upper() + "\n")
            elif macro in {"nf", "EX"}:
                flush()
                literal = True
            elif macro in {"fi", "EE"}:
                flush()
                literal = False
            elif macro == "It":
                flush()
                paragraph.append(_mdoc("No", args, name))
            elif macro in _BREAKS:
                flush()
                if macro == "IP" and text and text[0] != "*":
                    paragraph.append(text[0])
            elif macro in _ALTERNATING:
                paragraph.append("".join(text))
            elif macro in _FONTS:
                paragraph.append(" ".join(text))
            elif macro == "Nm" and not name and args:
                name = args[0]
                paragraph.append(" ".join(text).replace(" ,", ","))
            elif macro == "Nd":
                paragraph.append("- " + _mdoc("No", args, name))
            elif macro in _MDOC_PLAIN or macro in _MDOC_AROUND or macro in {"Nm", "Fl", "Xr"}:
                paragraph.append(_mdoc(macro, args, name))
            else:
                continue
        elif table:
            continue
        elif not line.strip():
            flush()
        else:
            paragraph.append(unescape(line))
        if literal:
            flush()
    flush()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"
