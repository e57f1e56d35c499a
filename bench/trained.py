"""What a bench trained, kept: at the usual numbers in `bench/results/trained`, for everybody, as hours of training are judged in minutes. A peer is a line of a
file, a table a file of its own; what is deleted is trained anew."""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mteo.embeddings import Embeddings, load_embeddings, save_embeddings
from mteo.precision import multiplies_bfloat16


@dataclass
class Trained:
    """A folder for one model's trainings; two processes may write to it beside each other."""

    folder: Path

    def peer(self, name: str, make) -> dict:
        """make(), as `peers.methods.train` returns it, or what the line of that name says: with "bfloat16", whether the network computed in it."""
        file = self.folder / "peers.jsonl"
        if name not in (lines := lines_of(file)):
            self.folder.mkdir(parents=True, exist_ok=True)
            made = make()
            line = dict(name=name, bfloat16=multiplies_bfloat16()) | made | dict(learned={key: value.tolist() for key, value in made["learned"].items()})
            with file.open("a") as open_file:
                open_file.write(json.dumps(line) + "\n")
            print(f"[bench] {name}", flush=True)
            lines = lines_of(file)
        return lines[name] | dict(learned={key: torch.tensor(value) for key, value in lines[name]["learned"].items()})

    def table(self, name: str, make) -> Embeddings:
        """make(), or what the file NAME.safetensors has, a comma in whose name is a hyphen."""
        file = self.folder / f"{name.replace(', ', '-')}.safetensors"
        if not file.is_file():
            save_embeddings(make(), file)
            print(f"[bench] {name}", flush=True)
        return load_embeddings(file)


def lines_of(file: Path) -> dict[str, dict]:
    """Lines by name, the later one of two."""
    return {line["name"]: line for line in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
