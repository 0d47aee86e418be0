"""The rooms of the package, checked: who may import whom, which files stay free of torch, what never appears.

Source is read as a syntax tree, so an import inside a function counts like one at the top, and so does
importlib.import_module with a literal name. The checks take a folder; the last tests run them on small wrong
packages, to be seen failing.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fapool_plugin"
MAX_LINES = 400

# What each room may import, beside itself. A new folder fails the test until it stands here.
_NUMBERS = {"config"}
_ENDS = _NUMBERS | {"kernels", "plan", "wire", "observe", "store", "devices"}
_SIDES = _ENDS | {"base", "pool"}
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "kernels": _NUMBERS,
    "plan": _NUMBERS,
    "store": {"plan"},
    "wire": _NUMBERS,
    "observe": _NUMBERS,
    "devices": _NUMBERS,
    "base": _ENDS,
    "pool": _ENDS,
    "ranks": _SIDES,
    "measure": _SIDES - {"pool"},
    "integrations": _SIDES | {"ranks", "measure"},
    "run": _SIDES | {"ranks", "measure", "integrations"},
    "__init__": _SIDES | {"ranks", "measure", "integrations"},
    "tools": _SIDES | {"ranks", "measure", "integrations", "__init__"},
}
MOST_MODULES_AT_THE_TOP = 6
# Where alone a framework may be imported.
HOMES = {
    "transformers": {"integrations.huggingface", "integrations.tensor_parallel"},
    "deepspeed": {"integrations.deepspeed"},
    "megatron": {"integrations.megatron"},
    "accelerate": {"integrations.accelerate"},
    "ray": {"ranks.directory"},
    "flash_attn": {"kernels.flash_attn"},
}
# Which homes use others': a host hands its models to transformers' home, and that one splits them by Megatron's layers.
HOSTED = {
    "integrations.tensor_parallel": {"integrations.megatron"},
    "integrations.huggingface": {"integrations.tensor_parallel"},
    "integrations.deepspeed": {"integrations.huggingface", "integrations.tensor_parallel", "integrations.megatron"},
    "integrations.accelerate": {"integrations.huggingface", "integrations.deepspeed"},
}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
MAY_READ_ENVIRONMENT = {"tools.doctor", "tools.bench.contenders", "ranks.launch", "run", "pool.process"}


def module_name(path: Path, root: Path) -> str:
    """A file's module inside the package: "plan", "integrations.huggingface", "integrations", "__init__"."""
    parts = path.relative_to(root / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    return {module_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}


def imports(path: Path, root: Path) -> Iterator[str]:
    """Absolute dotted names a file imports; "from a import b" gives a.b, whether b is a module or not."""
    parents = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)


def top(imported: str) -> str:
    return imported.split(".")[0]


def home_of(module: str) -> str:
    """integrations.huggingface.cache and integrations.huggingface are both integrations.huggingface."""
    return ".".join(module.split(".")[:2])


def inner_imports(path: Path, root: Path) -> set[str]:
    """The package's own modules that a file imports, by the longest name that is a file."""
    known = modules(root)
    found = set()
    for imported in imports(path, root):
        if top(imported) != PACKAGE:
            continue
        parts = imported.split(".")[1:]
        names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        found.add(next((name for name in names if name in known), "__init__"))
    return found


def wrong_rooms(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        room = top(module)
        if room not in ROOMS:
            problems.append(f"{module} has no room: say in ROOMS what {room} may import")
            continue
        for other in sorted(inner_imports(path, root) - {module}):
            hosted = home_of(other) in HOSTED.get(home_of(module), set()) | {home_of(module)}
            inside = top(other) == room and (room != "integrations" or hosted)
            if not inside and top(other) not in ROOMS[room]:
                problems.append(f"{module} imports {other}, which {room} may not")
    return problems


def circles(root: Path) -> list[str]:
    """Modules that import each other, lazily or not, inside a room too."""
    sorter = TopologicalSorter({module: inner_imports(path, root) - {module} for module, path in modules(root).items()})
    try:
        sorter.prepare()
    except CycleError as error:
        return [f"a circle: {' <- '.join(error.args[1])}"]
    return []


def crowded_top(root: Path) -> list[str]:
    at_top = [path.name for path in sorted((root / PACKAGE).glob("*.py"))]
    few = len(at_top) <= MOST_MODULES_AT_THE_TOP
    return [] if few else [f"{len(at_top)} modules at the top, {', '.join(at_top)}: at most {MOST_MODULES_AT_THE_TOP}"]


def torch_in_plan(root: Path) -> list[str]:
    return [
        f"{module} imports {imported}; plan knows no torch"
        for module, path in modules(root).items()
        if top(module) == "plan"
        for imported in imports(path, root)
        if top(imported) == "torch"
    ]


def homeless_frameworks(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        for imported in imports(path, root):
            for framework, homes in HOMES.items():
                # flash_attn_interface and its like are flash_attn too.
                if top(imported).startswith(framework) and not homes & {module, home_of(module)}:
                    problems.append(f"{module} imports {imported}; only {', '.join(sorted(homes))} may")
    return problems


def pickles(root: Path) -> list[str]:
    return [
        f"{module} imports {imported}; nothing here is pickled"
        for module, path in modules(root).items()
        for imported in imports(path, root)
        if top(imported) in PICKLES
    ]


def environment_readers(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        names = {name.removeprefix("os.") for name in imports(path, root) if top(name) == "os"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                names.add(node.attr)
        if (used := names & ENVIRONMENT) and module not in MAY_READ_ENVIRONMENT:
            problems.append(f"{module} uses os.{', os.'.join(sorted(used))}; settings come from the config")
    return problems


def untidy_files(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None:
            problems.append(f"{module} has no docstring")
        if path.name == "utils.py":
            problems.append(f"{module}: no utils.py; name it after what it does")
        if not (path.parent / "__init__.py").exists():
            problems.append(f"{module}: its folder has no __init__.py, so it would not be installed")
    for folder in (PACKAGE, "tests", "examples"):
        for path in sorted((root / folder).rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                problems.append(f"{path.relative_to(root)} has {lines} lines, more than {MAX_LINES}")
    return problems


CHECKS = (
    wrong_rooms,
    circles,
    crowded_top,
    torch_in_plan,
    homeless_frameworks,
    pickles,
    environment_readers,
    untidy_files,
)


def all_problems(root: Path) -> list[str]:
    return [problem for check in CHECKS for problem in check(root)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_its_rooms(check) -> None:
    problems = check(ROOT)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("room", ["config", "plan", "observe"])
def test_numbers_run_without_torch(room: str) -> None:
    names = [f"{PACKAGE}.{module}" for module in modules(ROOT) if top(module) == room]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules and 'torch was imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"importing {', '.join(names)}: {done.stderr}"


def write_package(root: Path, files: dict[str, str]) -> Path:
    folders = {f"{Path(name).parent}/__init__.py" for name in files if "/" in name} - {"integrations/other/__init__.py"}
    for name, source in {"__init__.py": "", **dict.fromkeys(folders, ""), **files}.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Says what it is."""\n{source}\n')
    return root


RIGHT = {
    "__init__.py": "def __getattr__(name):\n    from .integrations.huggingface import Model",
    "config.py": "import os\nos.path.join('a', 'b')",
    "plan/line.py": "import math",
    "plan/shares.py": "from fapool_plugin import config\nfrom .line import cut",
    "kernels/flash_attn.py": "import torch, importlib\nimportlib.import_module('flash_attn')",
    "observe/metrics.py": "import time",
    "wire/link.py": "from ..config import FAPoolConfig",
    "base/attention.py": "import fapool_plugin.plan.shares\nfrom ..kernels import flash_attn",
    "pool/process.py": "import os\nos.environ['A'] = 'b'",
    "pool/worker.py": "from .process import run_to_end",
    "ranks/local.py": "from fapool_plugin.pool.process import start",
    "integrations/__init__.py": "",
    "integrations/huggingface/__init__.py": "from fapool_plugin.integrations.huggingface.model import Model",
    "integrations/huggingface/model.py": "import transformers.cache_utils\nfrom .cache import Cache",
    "integrations/huggingface/cache.py": "from transformers import Cache\nfrom ...base.attention import call",
    "integrations/megatron/layers.py": "import megatron.core\nfrom ..megatron.mlp import Mlp",
    "integrations/megatron/mlp.py": "from fapool_plugin.config import FAPoolConfig",
    "run.py": "from fapool_plugin.ranks.local import start",
    "tools/cli.py": "from fapool_plugin.tools import demo, doctor",
    "tools/demo.py": "from fapool_plugin.integrations.huggingface import Model",
    "tools/doctor.py": "import importlib.util\nimportlib.util.find_spec('deepspeed')",
}


def test_checker_accepts_a_right_package(tmp_path: Path) -> None:
    problems = all_problems(write_package(tmp_path, RIGHT))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("plan/shares.py", "from fapool_plugin.base.attention import call", "plan.shares imports base.attention"),
        ("plan/shares.py", "def f():\n    from ..base.attention import call", "plan.shares imports base.attention"),
        ("kernels/forward.py", "import fapool_plugin.plan.line", "kernels.forward imports plan.line"),
        ("config.py", "from fapool_plugin.plan import line", "config imports plan.line"),
        ("config.py", "from fapool_plugin import __version__", "config imports __init__"),
        ("pool/worker.py", "from ..base import attention", "pool.worker imports base.attention"),
        ("base/attention.py", "from ..pool.worker import Worker", "base.attention imports pool.worker"),
        (
            "base/attention.py",
            "import importlib\nimportlib.import_module('fapool_plugin.tools.cli')",
            "base.attention imports tools.cli",
        ),
        ("tools/demo.py", "from .cli import main", "a circle"),
        ("plan/line.py", "def f():\n    from .shares import g", "a circle"),
        ("integrations/huggingface/model.py", "from ..deepspeed import setup", "imports integrations"),
        ("integrations/megatron/mlp.py", "from ..huggingface.model import Model", "imports integrations.huggingface"),
        ("integrations/huggingface/model.py", "from fapool_plugin.tools.demo import main", "imports tools.demo"),
        ("novelty.py", "", "novelty has no room"),
        ("novelties/novelty.py", "", "novelties.novelty has no room"),
        ("plan/line.py", "import torch", "plan.line imports torch"),
        ("plan/line.py", "def f():\n    from torch.nn import functional", "plan.line imports torch.nn.functional"),
        ("pool/worker.py", "import transformers", "only integrations.huggingface, integrations.tensor_parallel may"),
        ("integrations/accelerate.py", "from deepspeed import zero", "only integrations.deepspeed"),
        ("integrations/huggingface/model.py", "import megatron.core", "only integrations.megatron may"),
        ("run.py", "import accelerate", "only integrations.accelerate may"),
        ("base/attention.py", "from flash_attn_interface import f", "only kernels.flash_attn may"),
        ("wire/link.py", "from pickle import loads", "nothing here is pickled"),
        ("pool/worker.py", "import os\nx = os.environ.get('X')", "pool.worker uses os.environ"),
        ("plan/line.py", "from os import getenv as g", "plan.line uses os.getenv"),
        ("base/utils.py", "", "no utils.py"),
        ("integrations/other/thing.py", "", "has no __init__.py"),
        ("pool/worker.py", "\n" * MAX_LINES, "more than 400"),
        ("../tests/test_long.py", "\n" * MAX_LINES, "more than 400"),
        ("../examples/long.py", "\n" * MAX_LINES, "more than 400"),
    ],
)
def test_checker_refuses(tmp_path: Path, name: str, source: str, told: str) -> None:
    problems = all_problems(write_package(tmp_path, {**RIGHT, name: source}))
    assert any(told in problem for problem in problems), problems


def test_checker_counts_the_top(tmp_path: Path) -> None:
    few = {f"config{number}.py": "" for number in range(MOST_MODULES_AT_THE_TOP)}
    assert any("modules at the top" in problem for problem in all_problems(write_package(tmp_path, {**RIGHT, **few})))


def test_checker_misses_docstrings(tmp_path: Path) -> None:
    root = write_package(tmp_path, RIGHT)
    (root / PACKAGE / "plan" / "line.py").write_text("import math\n")
    assert all_problems(root) == ["plan.line has no docstring"]
