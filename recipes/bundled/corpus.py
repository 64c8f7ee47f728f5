"""Bundled checkpoint: the corpus, taken from Debian's packages by name.

In: `packages.txt`. Out: the pages' text and the NAME lines, under a work folder; nothing is
installed and nothing of the corpus but `names.jsonl` is kept in the repository.
Source: the packages' own manual pages, sections 1, 5, 7 and 8.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from roff import plain

HERE = Path(__file__).parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,27}")
MAX_PAGE_CHARACTERS = 40_000


@dataclass(frozen=True)
class Page:
    """One manual page: where it came from and its text."""

    name: str
    section: str
    package: str
    text: str


@dataclass(frozen=True)
class NameLine:
    """What a manual's NAME section says of one command."""

    command: str
    section: str
    package: str
    line: str


def packages() -> list[str]:
    """The packages whose pages are the corpus."""
    return (HERE / "packages.txt").read_text().split()


def download(folder: Path) -> None:
    """Fetch the packages with apt-get and unpack their manual pages, installing nothing."""
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    have = {path.name.split("_")[0] for path in debs.glob("*.deb")}
    missing = [name for name in packages() if name not in have]
    if missing:
        subprocess.run(["apt-get", "update", "-q"], check=False)
        subprocess.run(["apt-get", "download", "-q", *missing], cwd=debs, check=True)
    for deb in sorted(debs.glob("*.deb")):
        target = folder / "unpacked" / deb.name.split("_")[0]
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], check=True)


def pages(folder: Path, sections: str = "1578") -> Iterator[Page]:
    """Every page of the wanted sections, in a fixed order; links to other pages are left out."""
    order = {name: i for i, name in enumerate(packages())}
    found = []
    for section in sections:
        for path in (folder / "unpacked").glob(f"*/usr/share/man/man{section}/*"):
            package = path.relative_to(folder / "unpacked").parts[0]
            if path.is_file() and not path.is_symlink() and package in order:
                found.append((section, order[package], path.name, package, path))
    for section, _, file, package, path in sorted(found):
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        source = raw.decode("utf-8", "replace")
        if re.match(r"(?s)\s*\.so\s", source):
            continue
        stem = file.removesuffix(".gz").rpartition(".")[0]
        yield Page(stem, section, package, plain(source)[:MAX_PAGE_CHARACTERS])


def name_line(page: Page) -> NameLine | None:
    """The page's NAME line, or None if it is not well formed (see `names.jsonl`'s checker)."""
    match = re.search(r"(?m)^NAME\n\s*(.+)$", page.text)
    if not match:
        return None
    text = re.sub(r"\s+", " ", match[1]).strip()
    names, dash, description = text.replace(" -- ", " - ", 1).partition(" - ")
    if not dash:
        return None
    description = description.strip()
    if description.endswith(".") and description.count(".") == 1:
        description = description[:-1].rstrip()
    listed = names.strip().split(", ")
    same = [name for name in listed if name.lower() == page.name.lower()]
    command = page.name if same else listed[0]  # nc_openbsd.1 describes nc
    line = NameLine(command, page.section, page.package, f"{names.strip()} - {description}")
    return line if not complaint(line) else None


def complaint(entry: NameLine) -> str | None:
    """Say what is wrong with a NAME line, or None: the checker of `names.jsonl`."""
    names_text, dash, description = entry.line.partition(" - ")
    names = names_text.split(", ")
    if not dash:
        return "no ' - ' in the line"
    if not entry.command.islower():
        return "the command has capital letters"
    if not all(map(NAME.fullmatch, [entry.command, *names])):
        return "a name is not of the form [A-Za-z0-9][A-Za-z0-9._+-]{0,27}"
    if len(names) > 6:
        return "more than 6 names"
    if entry.command.lower() not in {name.lower() for name in names}:
        return "the command is not among the line's names"
    if not 6 <= len(description) <= 100 or not description.isascii():
        return "the description is not 6 to 100 ASCII characters"
    if not description.isprintable() or "  " in entry.line or "\\" in entry.line:
        return "the line has control characters, a backslash or double blanks"
    if entry.section not in {"1", "8"}:
        return "section is neither 1 nor 8"
    return None


def name_lines(all_pages: list[Page]) -> list[NameLine]:
    """One line a command of sections 1 and 8; where two pages name it, the first in order."""
    lines: dict[str, NameLine] = {}
    for page in all_pages:
        if page.section in "18":
            entry = name_line(page)
            if entry and entry.command not in lines:
                lines[entry.command] = entry
    return sorted(lines.values(), key=lambda entry: entry.command)


def read_names(path: Path = HERE / "names.jsonl") -> list[NameLine]:
    """The NAME lines kept in the repository."""
    return [NameLine(**json.loads(line)) for line in path.read_text().splitlines()]


def check(path: Path = HERE / "names.jsonl") -> list[str]:
    """Check the list: every line well formed, commands unique and sorted, at least 900."""
    entries = read_names(path)
    complaints = [
        f"{path.name}:{number}: {entry.command}: {wrong}"
        for number, entry in enumerate(entries, 1)
        if (wrong := complaint(entry))
    ]
    commands = [entry.command for entry in entries]
    if commands != sorted(set(commands)):
        complaints.append(f"{path.name}: commands are not unique and sorted")
    if len(entries) < 900:
        complaints.append(f"{path.name}: {len(entries)} lines, wanted at least 900")
    return complaints


def main() -> None:
    """Download, strip and write `pages.jsonl`; write or compare `names.jsonl`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/bundled"))
    parser.add_argument("--check", action="store_true", help="only check names.jsonl")
    parser.add_argument("--write-names", action="store_true", help="renew names.jsonl")
    args = parser.parse_args()
    if not args.check:
        download(args.work)
        everything = list(pages(args.work))
        with open(args.work / "pages.jsonl", "w") as file:
            file.writelines(json.dumps(asdict(page)) + "\n" for page in everything)
        lines = name_lines(everything)
        print(f"{len(everything)} pages, {sum(len(p.text) for p in everything)} characters")
        if args.write_names:
            rows = [json.dumps(asdict(entry)) + "\n" for entry in lines]
            (HERE / "names.jsonl").write_text("".join(rows))
        elif lines != read_names():
            print("note: Debian's pages have changed since names.jsonl was written")
    complaints = check()
    print("\n".join(complaints) or f"names.jsonl: {len(read_names())} well-formed NAME lines")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
