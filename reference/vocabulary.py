"""The words of the reference models: one word, one drawing, one token."""
from pathlib import Path

SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>", "and")
PAD, START, END, UNKNOWN, AND = range(len(SPECIAL))
LENGTH = 8  # tokens of a prompt, start, end and padding included
DRAWINGS_FILE = Path(__file__).with_name("vocabulary.txt")


def read_drawings(path: Path = DRAWINGS_FILE) -> dict[str, int]:
    """Word -> Unicode code point of its drawing, in file order."""
    entries = [word for line in path.read_text(encoding="ascii").splitlines() if not line.startswith("#") for word in line.split()]
    return {name: int(code, 16) for name, code in zip(entries[::2], entries[1::2], strict=True)}


DRAWINGS = read_drawings()
WORDS = (*SPECIAL, *DRAWINGS)
TOKEN = {word: token for token, word in enumerate(WORDS)}


def tokenize(text: str) -> list[int]:
    """Prompt -> tokens with start and end, without padding; words that no drawing has become `<unknown>`."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return [START, *(TOKEN.get(word, UNKNOWN) for word in words), END]


def padded(text: str) -> list[int]:
    """Prompt -> exactly LENGTH tokens, cut or padded as ComfyUI's tokenizer does."""
    tokens = tokenize(text)
    if len(tokens) > LENGTH:
        tokens = [*tokens[: LENGTH - 1], END]
    return tokens + [PAD] * (LENGTH - len(tokens))
