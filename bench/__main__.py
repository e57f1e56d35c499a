"""python -m bench NAME: prints what it does, and one JSON object as the last line of standard output."""
import argparse
import importlib
import json
import os

from trainer.comfyui import find_root, open_comfyui

NAMES = (
    "heldout", "quality", "seeds", "budgets", "generality", "ablations", "cost", "predicted",
    "guided", "redraw", "exactness", "overhead", "gpu", "pictures",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--comfyui", help="ComfyUI's root (else COMFYUI_PATH)")
    parser.add_argument("name", choices=NAMES)
    options, rest = parser.parse_known_args()
    open_comfyui(find_root(options.comfyui or os.environ.get("COMFYUI_PATH")))
    result = importlib.import_module(f"bench.{options.name}").run(rest)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
