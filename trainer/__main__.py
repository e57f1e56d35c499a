"""python -m trainer distill run.toml | diagnose run.toml | sample | inspect: see --help of each."""
import argparse
import sys

if not __package__:  # "python trainer", for a Python that does not look for modules in the current folder, as that of ComfyUI's portable for Windows
    sys.path[0], __package__ = __file__.rpartition("trainer")[0] or ".", "trainer"

from mteo.errors import MTEOError

from . import config, diagnose, distill, inspect, sample

COMMANDS = {"distill": distill, "diagnose": diagnose, "sample": sample, "inspect": inspect}


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no Δ
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Distil few-step time embeddings, sample with them, look into them.")
    parser.add_argument("--comfyui", help="ComfyUI's root (else the one that this pack is installed in)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        own = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        config.add_flags(own) if name == "distill" else module.add_flags(own)
    options = parser.parse_args()
    try:
        COMMANDS[options.command].run(options)
    except (MTEOError, OSError) as error:
        print(f"mteo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmteo: stopped; the same command goes on from here where there is a run folder.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
