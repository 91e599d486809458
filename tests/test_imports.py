"""The import rule of docs/architecture.md, read off the source: imports run one way, each heavy dependency has a door.

Every import counts, also one inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each part may import of ours, beside itself. "top" are the files directly in brt_dist: the command line, the
# configuration of a run and the package's own door; they stand above everything and nothing may import them.
BELOW = {
    "top": {"preprocessing", "train", "inference", "checkpoint", "parallel", "model", "data"},
    "train": {"inference", "checkpoint", "parallel", "model", "data"},
    "inference": {"checkpoint", "parallel", "model", "data"},
    "checkpoint": {"parallel", "model"},
    "parallel": {"model"},
    "preprocessing": {"data"},
    "model": set(),
    "data": set(),
}

# The only files that may import a heavy dependency.
DOORS = {
    "deepspeed": [f"brt_dist/train/{file}.py" for file in ("deepspeed_config", "pipeline", "sharded")],
    "fsspec": ["preprocessing/storage.py"],
    "matplotlib": ["brt_dist/inference/plot.py", "preprocessing/lengths.py"],
    "megatron": ["brt_dist/data/megatron_dataset.py", "brt_dist/parallel/tensor_layers.py"],
    "mpi4py": ["preprocessing/*"],
    "pyarrow": ["brt_dist/data/token_shards.py", "preprocessing/readers/*"],
    "sentencepiece": ["brt_dist/data/tokenizer.py", "preprocessing/bench.py"],
    "transformers": [],
    "triton": [],
}

NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}


def sources(root: Path) -> list[Path]:
    """Every Python file of the packages, relative to `root`."""
    return sorted(
        path.relative_to(root) for name in ("brt_dist", "preprocessing") for path in (root / name).rglob("*.py")
    )


def part_of(module: str) -> str | None:
    """The part that a dotted module name belongs to; None where it is not ours."""
    names = module.split(".")
    if names[0] == "preprocessing":
        return "preprocessing"
    if names[0] != "brt_dist":
        return None
    return names[1] if len(names) > 1 and names[1] in BELOW else "top"


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that the file imports; `from a import b` gives a.b, relative names are resolved."""
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            yield node.lineno, name.value if isinstance(name, ast.Constant) else "a name known only when it runs"


def violations(root: Path) -> list[str]:
    """One line for each import that breaks a rule, in the tree at `root`."""
    found = []
    for path in sources(root):
        part = part_of(".".join(path.with_suffix("").parts))
        assert part is not None
        for line, name in imported(path, ast.parse((root / path).read_text(encoding="utf-8"))):
            target = part_of(name)
            if target not in (None, part) and target not in BELOW[part]:
                found.append(f"{path}:{line}: {part} imports {name}")
            doors = DOORS.get(name.split(".")[0])
            if doors is not None and not any(fnmatch(path.as_posix(), door) for door in doors):
                found.append(f"{path}:{line}: {name} has another door")
            if " " in name:
                found.append(f"{path}:{line}: imports {name}")
    return found


def loaded_after(statement: str) -> set[str]:
    """The top-level packages in memory after `statement`, in a process of its own."""
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_imports_run_one_way_and_heavy_dependencies_have_one_door():
    assert violations(ROOT) == []


def test_the_search_sees_every_part():
    seen = {part_of(".".join(path.with_suffix("").parts)) for path in sources(ROOT)}
    assert seen == set(BELOW)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("brt_dist/model/gates.py", "import brt_dist.data.lanes\n"),
        ("brt_dist/model/gates.py", "from brt_dist import data\n"),
        ("brt_dist/model/gates.py", "from brt_dist import ModelConfig\n"),
        ("brt_dist/model/gates.py", "from ..parallel import config\n"),
        ("brt_dist/model/gates.py", "def late():\n    from brt_dist.train import trainer\n"),
        ("brt_dist/data/lanes.py", "if TYPE_CHECKING:\n    from brt_dist.model.config import ModelConfig\n"),
        ("brt_dist/data/lanes.py", "import importlib\nimportlib.import_module('brt_dist.model')\n"),
        ("brt_dist/data/lanes.py", "import importlib\nimportlib.import_module(name)\n"),
        ("brt_dist/inference/evaluate.py", "from brt_dist.train.config import TrainConfig\n"),
        ("brt_dist/train/trainer.py", "from brt_dist.run_config import RunConfig\n"),
        ("preprocessing/prepare.py", "from brt_dist.model.config import ModelConfig\n"),
        ("brt_dist/train/trainer.py", "def late():\n    import deepspeed.ops\n"),
        ("brt_dist/data/lanes.py", "from pyarrow import ipc\n"),
        ("brt_dist/train/trainer.py", "from mpi4py import MPI\n"),
    ],
)
def test_the_search_finds_a_made_up_violation(file: str, text: str, tmp_path: Path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("brt_dist/model/gates.py", "from .config import ModelConfig\nfrom brt_dist.model import carry\n"),
        ("brt_dist/train/trainer.py", "from brt_dist.inference import report\nfrom brt_dist.data.lanes import x\n"),
        ("brt_dist/train/pipeline.py", "import deepspeed\n"),
        ("brt_dist/cli.py", "from preprocessing.prepare import prepare\nfrom brt_dist.run_config import x\n"),
    ],
)
def test_the_search_lets_rightful_imports_pass(file: str, text: str, tmp_path: Path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path) == []


def test_every_module_that_holds_anything_says_what_it_is_for():
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in sources(ROOT)}
    assert [path for path, text in texts.items() if text and not ast.get_docstring(ast.parse(text))] == []


def test_no_file_or_folder_has_a_name_that_says_nothing():
    assert [path for path in sources(ROOT) if NAMES_THAT_SAY_NOTHING & set(path.with_suffix("").parts)] == []


def test_importing_the_package_loads_no_dependency_at_all():
    assert not loaded_after("import brt_dist") & {"torch", "numpy", *DOORS}


def test_the_model_needs_torch_alone():
    loaded = loaded_after("from brt_dist import BlockRecurrentTransformer, ModelConfig")
    assert "torch" in loaded
    assert not loaded & {*DOORS, "pydantic", "yaml", "typer", "safetensors", "tensorboard"} - {"triton"}
