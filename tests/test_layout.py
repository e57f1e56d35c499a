"""What is in the repository and in the registry's archive, and what imports what."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pathspec
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = {".py", ".md", ".toml", ".json", ".txt", ".jsonl"}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def shipped(tracked) -> list[str]:
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines())
    return [name for name in tracked if not ignored.match_file(name)]


def test_the_core_and_the_trainer_import_without_comfyui():
    core = [f"mteo.{name}" for name in ("diagnose", "distill", "embeddings", "gridsearch", "teacher", "metrics", "sheet")]
    code = f"import {', '.join(core)}, trainer.__main__, sys; assert not {{'comfy', 'nodes'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_root_imports_bare_and_registers_nothing():
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlib.util as u; s = u.spec_from_file_location('pack', '__init__.py'); m = u.module_from_spec(s); s.loader.exec_module(m)",
        ],
        cwd=ROOT,
        check=True,
    )


def test_rooms_import_only_what_the_design_allows(tracked):
    forbidden = {
        "mteo/comfyui": r"(nodes|trainer)",
        "mteo": r"(comfy\w*|latent_preview|folder_paths|nodes|trainer|mteo/comfyui)",
        "trainer": r"nodes",
        "nodes": r"trainer",
    }
    looked_at = set()
    for name in (name for name in tracked if name.endswith(".py")):
        room = next((room for room in forbidden if name.startswith(f"{room}/")), None)
        for line in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))) if room else ():
            for module in imported(line, Path(name)):
                looked_at.add(module)
                assert not re.match(forbidden[room] + r"(/|$)", module), f"{name}: {module}"
    assert {"mteo/tableau", "mteo/comfyui/training", "comfy/samplers", "torch"} <= looked_at


def imported(line, name: Path) -> list[str]:
    """The modules that a line of a file imports, as paths; `from a import b` may mean a/b."""
    if isinstance(line, ast.Import):
        return [one.name.replace(".", "/") for one in line.names]
    if not isinstance(line, ast.ImportFrom):
        return []
    room = name.parents[line.level - 1] if line.level else Path()
    source = room / (line.module or "").replace(".", "/")
    return [source.as_posix(), *((source / one.name).as_posix() for one in line.names)]


def test_no_path_or_host_of_a_machine_is_in_the_repository(tracked):
    words = ["/" + "work/", "/" + "tmp/", "/" + "root/", "/" + "home/", "pypi" + ".org", "file:" + "//", "C:" + "\\"]
    for name in tracked:
        if Path(name).suffix in TEXT or Path(name).suffix == "":
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not [word for word in words if word in text], name


def test_weights_and_tables_are_small(tracked):
    sizes = {name: (ROOT / name).stat().st_size for name in tracked}
    assert max(sizes.values()) <= 20_000_000
    tables = {name: size for name, size in sizes.items() if name.startswith("reference/tables/") and name.endswith(".safetensors")}
    assert tables and max(tables.values()) <= 250_000


def test_the_archive_is_what_running_the_nodes_needs(shipped):
    tops = {name.split("/")[0] for name in shipped}
    assert {"__init__.py", "nodes", "mteo", "trainer", "reference", "workflows", "web", "README.md", "LICENSE", "pyproject.toml"} <= tops
    assert not tops & {"dev.py", "tests", "bench", "docs", ".ci"}
    assert sum((ROOT / name).stat().st_size for name in shipped) < 40_000_000
    risky = re.compile(
        r"\b(eval|exec|compile|__import__)\(|subprocess|os\.(system|environ)|import_module|read_bytes|base64|pickle|marshal|urllib|requests|socket"
    )
    for name in (name for name in shipped if name.endswith(".py")):
        found = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if risky.search(line) and "re.compile" not in line]
        assert not found, f"{name}: {found}"


def test_what_is_shipped_imports_only_what_is_shipped(shipped):
    modules = {name.removesuffix(".py").removesuffix("/__init__") for name in shipped if name.endswith(".py")}
    for name in (name for name in shipped if name.endswith(".py")):
        for line in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if not isinstance(line, ast.ImportFrom):
                continue
            room = Path(name).parents[line.level - 1] if line.level else Path()
            source = (room / (line.module or "").replace(".", "/")).as_posix()
            if line.level or source.split("/")[0] in ("mteo", "trainer", "reference", "bench"):
                names = {f"{source}/{one.name}" if source != "." else one.name for one in line.names}
                assert source in modules, f"{name}: {source} is not shipped"
                absent = {one for one in names if (ROOT / f"{one}.py").is_file()} - modules
                assert not absent, f"{name}: {absent} are not shipped"


def test_every_node_has_its_help_page():
    nodes = json.loads((ROOT / "tests" / "schema.json").read_text(encoding="utf-8"))
    for name in nodes:
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith("# ") and len(page) > 150, name


def test_ruff_is_content():
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, check=True)
