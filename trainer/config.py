"""What a headless run is told: a TOML file, flags on top of it."""
import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path

from mteo.errors import MTEOError
from mteo.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """model: "reference", "reference-mmdit" or a checkpoint file. prompts: a list, or a text file with one a line. width, height in pixels.
    folder: the run folder. recipe: see mteo/recipe.py."""

    model: str = "reference"
    prompts: list[str] = field(default_factory=list)
    negative: str = ""
    width: int = 512
    height: int = 512
    folder: Path = Path("runs/mteo")
    recipe: Recipe = field(default_factory=Recipe)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="TOML file; flags go before it")
    for one in fields(Run):
        if one.name != "recipe":
            parser.add_argument(f"--{one.name}")
    for one in fields(Recipe):
        parser.add_argument(f"--{one.name.replace('_', '-')}", dest=f"recipe.{one.name}")


def read_run(options: argparse.Namespace) -> Run:
    """The file's settings with the flags on top; MTEOError names a setting that is not known or of the wrong kind."""
    values = read_toml(options.config) if options.config else {}
    recipe = values.pop("recipe", {})
    known = {one.name: one.type for one in fields(Run)}
    for name in values:
        if name not in known:
            raise MTEOError(f"The run has no setting {name!r}: it knows {', '.join(known)} and a section [recipe].")
    if not isinstance(recipe, dict):
        raise MTEOError(f"recipe is {recipe!r}: make it a section, [recipe], with its settings below.")
    for name, given in vars(options).items():
        if given is not None and name.startswith("recipe."):
            recipe[name.removeprefix("recipe.")] = number(given)
        elif given is not None and name in known:
            values[name] = given
    if isinstance(recipe.get("guidance"), (int, float)):
        recipe["guidance"] = [recipe["guidance"]]
    for name in ("model", "negative", "folder"):
        if not isinstance(values.get(name, ""), (str, Path)):
            raise MTEOError(f"{name} is {values[name]!r}: give text.")
    values["prompts"] = read_prompts(values.get("prompts", []), Path(options.config).parent if options.config else Path())
    values |= {name: whole(name, values[name]) for name in ("width", "height") if name in values}
    values["folder"] = Path(values.get("folder", Run.folder))
    return Run(**values, recipe=Recipe.of(recipe))


def read_toml(path: str) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise MTEOError("To read a TOML file Python 3.10 needs tomli: pip install tomli, or give flags.") from None
    try:
        return tomllib.loads(text_of(Path(path)))
    except OSError as error:
        raise MTEOError(f"The config {path} cannot be read: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise MTEOError(f"The config {path} is not TOML: {error}.") from error


def read_prompts(given, beside: Path) -> list[str]:
    """A list as it is; a file's lines that are not empty, looked for beside the config, too."""
    if isinstance(given, str):
        path = next((place for place in (Path(given), beside / given) if place.is_file()), None)
        if path is None:
            raise MTEOError(f"The prompts file {given} is not there: give a text file with one prompt a line.")
        given = [line.strip() for line in text_of(path).splitlines() if line.strip()]
    if not given or not isinstance(given, list) or not all(isinstance(prompt, str) for prompt in given):
        raise MTEOError("No prompts: give a list of texts or a text file with one prompt a line.")
    return given


def text_of(path: Path) -> str:
    """UTF-8, with or without a mark at its beginning."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise MTEOError(f"{path.name} is not UTF-8 text: save it as UTF-8.") from None


def number(text: str):
    """A flag's value: numbers as numbers, "1,4" as a list of them, else the text."""
    if "," in text:
        return [number(part) for part in text.split(",") if part]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def whole(name: str, value) -> int:
    try:
        if (pixels := int(value)) >= 64:
            return pixels
    except (TypeError, ValueError):
        pass
    raise MTEOError(f"{name} is {value!r}: give a whole number of pixels, 64 or more.")
