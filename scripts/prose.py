#!/usr/bin/env python3
"""Find English that docs/contributing/style.md bans; print file:line for each place and exit with 1 if there is one.

    scripts/prose.py                         the whole project
    scripts/prose.py README.md src/hookx/run/*.py

It reads the comments and docstrings of Python files, every other string in src/ (errors, help, log lines), the comments
of shell scripts, and Markdown outside code.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The start of a passage, of a sentence, of a clause after a colon, of a paragraph, of a table's cell.
START = r"(?:\A|(?<=[.:;?!])\s+|\n\s*\n\s*|\|\s*)"
# A space matches any white space, so a construction is found across a line break.
BANNED = {
    START + r"Of ": "start with the subject: 'Of several types ...' -> 'One of the types ...'",
    r"[:;] of (?!course)": "name the thing: 'seed: of random weights' -> 'seed: seed for the random weights'",
    r"(?:\A|[,;(]\s?)of which\b(?! \d)": "'and ... of them', or a new sentence",
    r"\bas of (?:a|an|the|all|any|each|every)\b": "'like that of', or name the thing",
    r"(?<!here\s)\b(?:is|are|was|were) no (?!longer|more|less|fewer|better|worse|different|\w+er than)": "'is not a'",
    r"(?<!here\s)\b(?:is|are) (?:\d\S*|one|two) or more\b": "'must be at least N, got M'",
    r"\b(?:it|they|that|which) (?:is|are) \S+ at (?:most|least)\b": "'must be at most N, got M'",
    r"\bat the most\b": "'at most'",
    r"\bthat is what\b": "subject, verb, object",
    r"\bin vain\b": "say what failed",
    r"\bfor ever\b": "'forever', or name the limit",
    r"\bso many\b": "'that many', or give the number",
    r"\bthat there (?:cannot|can not|can never) be\b": "'that cannot exist'",
    r"\b(?:some|any|every|no)body's\b": "name the owner: the user's, another process's",
    r"\bone's own\b": "'your own', 'custom'",
    r"\b(?:is|are|was|were) told as\b": "'is reported as'",
    r"(?<!you\s)(?<!user\s)\basked for\b": "'requested', or name the flag",
    r"\bbe had\b": "'is available', 'can be loaded'",
    r"\b(?:can|may|could) be without\b": "'may lack'",
    r"\bknows? no\b": "'has no', 'does not support'",
    r"\baloud\b": "'with a warning'",
    r"\bwithout a word\b": "'silently'",
    r"\botherwise than\b": "'differently from'",
    r"\bonce only\b": "'only once'",
    r"\b(?:a|one) (?:line|row|picture|file|function|column|page|process|task|shard) an? \w+": "'one line per image'",
    r", also (?:after|if|on|inside|when|where|while)\b": "'even if', 'including'",
    r"\b(?:is|are) well[.,;]": "'is intact', 'is still usable'",
    r"\b(?:processe?|worker|decoder|parent)s? (?:had |has |have )?(?:dies?|died)\b": "processes exit or crash",
    r"\bchild(?:ren)? (?:had |has |have )?(?:dies?|died)\b": "processes exit or crash",
    r"\bthat began it\b": "'that started it'",
    r"\b(?:mistake|fault|error)s? of (?:the user|usage)\b": "'user error', 'usage error'",
    r"\b(?:say|says|said) of\b": "'say about'",
    r"\bheld against\b": "'compared with'",
    r"\bbut for what\b": "'except for'",
    r"\bas (?:it lies|they lie)\b": "'as stored'",
    r"\bthe one and the other\b": "'both'",
    r"\bstands? (?:above|below|beside|beneath|there)\b": "'is', 'is listed'",
    r"\b(?:wherein|whence|thence|thereof|therein|thereby|whereof|hitherto|lest)\b": "archaic",
}
BANNED_IN_DOCSTRINGS = BANNED | {r"\A\s*(?:Tell|Say)\b": "'Return whether', 'Report', 'Warn that'"}
BANNED_IN_NAMES = {r"\A[A-Z_]+_AT_(?:MOST|LEAST)\Z": "'MAX_...' or 'MIN_...'"}


@dataclass(frozen=True)
class Passage:
    """Text that is searched as one, with the number of its first line and the patterns that apply to it."""

    line: int
    text: str
    banned: dict[str, str]


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(" ", r"\s+"))


def read_comments(source: str) -> Iterator[Passage]:
    """Yield blocks of comments; lines that follow each other are one passage."""
    first, last, lines = 1, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if line != last + 1 or token.line.strip() != token.string:
                yield Passage(first, "\n".join(lines), BANNED)
                first, lines = line, []
            lines.append(token.string.lstrip("#! "))
            last = line
    yield Passage(first, "\n".join(lines), BANNED)


def read_strings(source: str, *, with_messages: bool) -> Iterator[Passage]:
    """Yield docstrings, strings below attributes included; `with_messages`, every other text with a space too."""
    tree = ast.parse(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts_of_f_strings = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts_of_f_strings:
            text = node.value
        else:
            continue
        if node in docstrings:
            text = re.sub(r"(?m)^ *(>>>|\.\.\. ).*$", "", text)
            yield Passage(node.lineno, text, BANNED_IN_DOCSTRINGS)
        elif with_messages and " " in text:
            yield Passage(node.lineno, text, BANNED)


def read_markdown(text: str) -> Iterator[Passage]:
    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1", blank, text)
    text = re.sub(r"(?s)<!--.*?-->", blank, text)
    yield Passage(1, re.sub(r"`[^`\n]+`", "CODE", text), BANNED)


def read_names(source: str) -> Iterator[Passage]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield Passage(token.start[0], token.string, BANNED_IN_NAMES)


def read_passages(file: Path, source: str) -> Iterator[Passage]:
    if file.suffix == ".md":
        yield from read_markdown(source)
    elif file.suffix == ".py":
        yield from read_names(source)
        yield from read_comments(source)
        yield from read_strings(source, with_messages="src" in file.parts)
    else:
        for number, line in enumerate(source.splitlines(), 1):
            if line.lstrip().startswith("#"):
                yield Passage(number, line.lstrip(" #!"), BANNED)


def find_banned(file: Path, source: str) -> list[tuple[int, str, str]]:
    """Return the line, the words and the advice for each banned construction in a file, by line."""
    found: list[tuple[int, str, str]] = []
    for passage in read_passages(file, source):
        for pattern, advice in passage.banned.items():
            for match in compile_pattern(pattern).finditer(passage.text):
                words = match[0].lstrip("\n |.:;,(")
                line = passage.line + passage.text.count("\n", 0, match.end() - len(words))
                found.append((line, " ".join(words.split()), advice))
    return sorted(found)


def list_files() -> list[Path]:
    """List the Markdown, and what is Python or a shell script, that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = re.compile(r".*\.md|(src|tests|scripts|examples)/.*\.py|(scripts|\.ci)/[^.]+")
    return [ROOT / name for name in sorted(names) if wanted.fullmatch(name) and (ROOT / name).is_file()]


def main() -> int:
    files = [Path(name).resolve() for name in sys.argv[1:]] or list_files()
    found = [
        f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{line}: '{words}': {advice}"
        for file in files
        for line, words, advice in find_banned(file, file.read_text())
    ]
    print("".join(f"{line}\n" for line in found), end="")
    if found:
        print(f"{len(found)} banned constructions; see docs/contributing/style.md", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
