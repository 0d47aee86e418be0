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
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fapool_plugin"
MAX_LINES = 400

# A module imports only from rows above its own. A new module fails the test until it stands in a row.
ROWS = (
    {"config", "cost", "partition", "placement", "metrics", "trace"},
    {"kernels", "kernel_backward", "kernel_torch", "rectangle"}
    | {
        "graph_kv",
        "kept_calls",
        "sequence",
        "store",
        "messages",
        "ideal_line",
        "lending",
        "meeting",
        "timeline",
        "transport",
        "prometheus",
    },
    {"plan", "launch", "lease", "clocks", "reduction", "worker_process"},
    {"forecast"},
    {"forward"},
    {"advisor"},
    {"resource_manager"},
    {"agreement", "gradients", "joint", "totals"},
    {"graph"},
    {"attention", "worker", "exchange", "rounds", "calibrate"},
    {"local_pool", "launched_pool", "supervisor", "calibrate_calls"},
    {"enlist", "pools"},
    {"integrations"},
    {
        "run",
        "bench",
        "bench_attention",
        "bench_report",
        "bench_turns",
        "contenders",
        "cli",
        "demo",
        "doctor",
        "options",
        "planning",
    }
    | {"__init__"},
)
# The only imports inside a row, besides those inside one framework's home.
INSIDE_ROW = {
    "cost": {"partition"},
    "placement": {"config"},
    "kernels": {"kernel_torch", "rectangle"},
    "kernel_backward": {"kernels", "kernel_torch", "rectangle"},
    "gradients": {"joint", "totals"},
    "graph_kv": {"rectangle"},
    "sequence": {"kept_calls"},
    "transport": {"messages"},
    "worker": {"exchange"},
    "cli": {"bench", "demo", "doctor", "options", "planning"},
    "bench": {"bench_report", "bench_turns", "contenders", "demo", "options", "planning"},
    "bench_report": {"contenders"},
    "bench_turns": {"bench_report", "contenders"},
    "contenders": {"bench_attention"},
    "planning": {"demo"},
}
# Where alone a framework may be imported: the module, or modules whose name goes on with "_".
HOMES = {
    "transformers": "integrations.huggingface",
    "deepspeed": "integrations.deepspeed",
    "megatron": "integrations.megatron",
    "accelerate": "integrations.accelerate",
    "flash_attn": "kernels",
}
# Which homes use others': a host hands its models to transformers' home, and that one splits them by Megatron's layers.
HOSTED = {
    "integrations.huggingface": {"integrations.megatron"},
    "integrations.deepspeed": {"integrations.huggingface", "integrations.megatron"},
    "integrations.accelerate": {"integrations.huggingface", "integrations.deepspeed"},
}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
MAY_READ_ENVIRONMENT = {"doctor", "contenders", "launch", "run", "worker_process"}


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


def row_of(module: str) -> int | None:
    return next((at for at, row in enumerate(ROWS) if top(module) in row), None)


def home_of(module: str) -> str:
    """integrations.huggingface_cache and integrations.huggingface.cache are both integrations.huggingface."""
    return ".".join(part.split("_")[0] for part in module.split(".")[:2])


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


def wrong_rows(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        row = row_of(module)
        if row is None:
            problems.append(f"{module} has no room: give it a row in ROWS")
            continue
        for other in sorted(inner_imports(path, root) - {module}):
            other_row = row_of(other)
            same_home = top(module) == "integrations" and home_of(module) == home_of(other)
            hosted = home_of(other) in HOSTED.get(home_of(module), set())
            allowed = same_home or hosted or top(other) in INSIDE_ROW.get(module, set())
            if not allowed and (other_row is None or other_row >= row):
                problems.append(f"{module} imports {other}, which is not in a row above its own")
    return problems


def torch_in_first_row(root: Path) -> list[str]:
    return [
        f"{module} imports {imported}; the first row knows no torch"
        for module, path in modules(root).items()
        if row_of(module) == 0
        for imported in imports(path, root)
        if top(imported) == "torch"
    ]


def homeless_frameworks(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        for imported in imports(path, root):
            for framework, home in HOMES.items():
                # flash_attn_interface and its like are flash_attn too.
                if top(imported).startswith(framework) and home not in (module, home_of(module)):
                    problems.append(f"{module} imports {imported}; only {home} may")
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
    wrong_rows,
    torch_in_first_row,
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


@pytest.mark.parametrize("module", sorted(ROWS[0] & modules(ROOT).keys()))
def test_first_row_runs_without_torch(module: str) -> None:
    code = f"import sys, {PACKAGE}.{module}; sys.exit('torch' in sys.modules and 'torch was imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"importing {PACKAGE}.{module}: {done.stderr}"


def write_package(root: Path, files: dict[str, str]) -> Path:
    for name, source in {"__init__.py": "", "integrations/__init__.py": "", **files}.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Says what it is."""\n{source}\n')
    return root


RIGHT = {
    "__init__.py": "def __getattr__(name):\n    from .integrations.huggingface import Model",
    "config.py": "import os\nos.path.join('a', 'b')",
    "partition.py": "import math",
    "kernels.py": "import torch, importlib\nimportlib.import_module('flash_attn')",
    "plan.py": "from fapool_plugin import config, partition\nfrom .kernels import attend",
    "attention.py": "import fapool_plugin.plan\nfrom . import kernels",
    "worker_process.py": "import os\nos.environ['A'] = 'b'",
    "integrations/huggingface.py": "import transformers.cache_utils\nfrom .huggingface_cache import Cache",
    "integrations/huggingface_cache.py": "from transformers import Cache\nfrom ..attention import call",
    "integrations/megatron/__init__.py": "from .layers import Layer",
    "integrations/megatron/layers.py": "import megatron.core\nfrom ..megatron.mlp import Mlp",
    "integrations/megatron/mlp.py": "from fapool_plugin.config import FAPoolConfig",
    "cli.py": "from fapool_plugin import demo, doctor",
    "demo.py": "from fapool_plugin.integrations.huggingface import Model",
    "doctor.py": "import importlib.util\nimportlib.util.find_spec('deepspeed')",
}


def test_checker_accepts_a_right_package(tmp_path: Path) -> None:
    problems = all_problems(write_package(tmp_path, RIGHT))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("plan.py", "from fapool_plugin.attention import call", "plan imports attention"),
        ("plan.py", "def f():\n    from .attention import call", "plan imports attention"),
        ("kernels.py", "import fapool_plugin.plan", "kernels imports plan"),
        ("config.py", "from fapool_plugin import partition", "config imports partition"),
        ("config.py", "from fapool_plugin import __version__", "config imports __init__"),
        ("worker.py", "from . import attention", "worker imports attention"),
        (
            "attention.py",
            "import importlib\nimportlib.import_module('fapool_plugin.cli')",
            "attention imports cli",
        ),
        ("demo.py", "from .cli import main", "demo imports cli"),
        ("integrations/huggingface.py", "from .deepspeed import setup", "huggingface imports integrations"),
        (
            "integrations/megatron/mlp.py",
            "from ..huggingface import Model",
            "imports integrations.huggingface",
        ),
        ("integrations/huggingface.py", "from fapool_plugin.demo import main", "huggingface imports demo"),
        ("novelty.py", "", "novelty has no room"),
        ("partition.py", "import torch", "partition imports torch"),
        (
            "metrics.py",
            "def f():\n    from torch.nn import functional",
            "metrics imports torch.nn.functional",
        ),
        ("worker.py", "import transformers", "only integrations.huggingface may"),
        ("integrations/accelerate.py", "from deepspeed import zero", "only integrations.deepspeed may"),
        ("integrations/huggingface.py", "import megatron.core", "only integrations.megatron may"),
        ("run.py", "import accelerate", "only integrations.accelerate may"),
        ("attention.py", "from flash_attn_interface import f", "only kernels may"),
        ("transport.py", "from pickle import loads", "nothing here is pickled"),
        ("worker.py", "import os\nx = os.environ.get('X')", "worker uses os.environ"),
        ("cost.py", "from os import getenv as g", "cost uses os.getenv"),
        ("utils.py", "", "no utils.py"),
        ("integrations/other/thing.py", "", "has no __init__.py"),
        ("worker.py", "\n" * MAX_LINES, "more than 400"),
        ("../tests/test_long.py", "\n" * MAX_LINES, "more than 400"),
        ("../examples/long.py", "\n" * MAX_LINES, "more than 400"),
    ],
)
def test_checker_refuses(tmp_path: Path, name: str, source: str, told: str) -> None:
    problems = all_problems(write_package(tmp_path, {**RIGHT, name: source}))
    assert any(told in problem for problem in problems), problems


def test_checker_misses_docstrings(tmp_path: Path) -> None:
    root = write_package(tmp_path, RIGHT)
    (root / PACKAGE / "plan.py").write_text("import math\n")
    assert all_problems(root) == ["plan has no docstring"]
