"""Runs notebooks from the first cell to the last and keeps what they print and draw, ready to be committed.

    python examples/notebooks/execute.py                       # all that lie beside this file
    python examples/notebooks/execute.py 01_quickstart.ipynb   # one

Run this after a notebook was changed, on a machine that does little else, and commit the result. The tests run every
notebook with smaller numbers and look at what is committed. A notebook needs one cell with the tag ``parameters`` that
assigns all that makes it long, no output on stderr, at least one picture, and no path of the machine it ran on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import nbformat
import typer
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
LARGEST = 400_000
"""Bytes of a notebook with its outputs."""
_KERNEL = "this-python"
_PATHS = re.compile(r"(?<![\w.:/<])(?:/(?:(?:home|root|Users|tmp)(?![\w-])|[\w.-]+/[\w.-])|~/|[A-Za-z]:\\)\S*")


def with_parameters(notebook: Any, parameters: Mapping[str, Any]) -> Any:
    """Adds other values to the end of the parameters cell, in place.

    Raises:
        ValueError: there is not exactly one such cell, or it does not assign one of these names.
    """
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise ValueError(f"{len(tagged)} cells have the tag 'parameters'; give it to one")
    statements = ast.parse(tagged[0].source).body
    known = {ast.unparse(target) for one in statements if isinstance(one, ast.Assign) for target in one.targets}
    if unknown := sorted(parameters.keys() - known):
        raise ValueError(f"the parameters cell does not assign {', '.join(unknown)}, only {', '.join(sorted(known))}")
    tagged[0].source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


def execute(notebook: Any, cell_timeout_s: int = 600) -> None:
    """Runs all cells, in place, with this interpreter as kernel, in a temporary folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        nbclient.exceptions.CellTimeoutError: a cell took more than ``cell_timeout_s`` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        write_kernel_spec(folder / "kernels" / _KERNEL)
        manager = AsyncKernelManager(
            kernel_name=_KERNEL,
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(folder / "kernels")], ensure_native_kernel=False),
            connection_file=str(folder / "connection.json"),
            transport="ipc",
            ip=str(folder / "socket"),
        )
        # tqdm misses widgets, which would only draw its bars.
        quiet = {"IPYTHONDIR": str(folder / "ipython"), "PYTHONWARNINGS": "ignore:IProgress not found"}
        client = NotebookClient(notebook, km=manager, timeout=cell_timeout_s, coalesce_streams=True)
        client.execute(cleanup_kc=True, cwd=str(folder / "work"), env=os.environ | quiet)


def fingerprint(notebook: Any) -> str:
    """Of all code: tells outputs of these cells from those of others."""
    sources = json.dumps([cell.source for cell in notebook.cells if cell.cell_type == "code"])
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def tidied(notebook: Any) -> Any:
    """Drops, in place, what says nothing to a reader and differs from run to run."""
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}"
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "fapool": {"outputs_of": fingerprint(notebook)},
    }
    return notebook


def problems(text: str) -> Iterator[str]:
    """Why a notebook, as the text of its file, should not be committed."""
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    if len(text.encode()) >= LARGEST:
        yield f"it has {len(text.encode())} bytes, {LARGEST} or more: draw smaller pictures"
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not run from the first to the last, once each"
    if notebook.metadata.get("fapool", {}).get("outputs_of") != fingerprint(notebook):
        yield "its outputs are those of other cells"
    if not any("image/png" in output.get("data", {}) for output in outputs):
        yield "it has no picture"
    for output in outputs:
        if output.output_type == "error":
            yield f"a cell ended with {output.ename}: {output.evalue}"
        elif output.get("name") == "stderr":
            yield f"there is output on stderr: {output.text[:200]!r}"
    for shown in [*(cell.source for cell in notebook.cells), *(text for output in outputs for text in _texts(output))]:
        if path := _PATHS.search(shown):
            yield f"it shows a path of the machine: {path[0]}"
        if "\x1b" in shown:
            yield "an output moves a terminal's cursor or colors it: print plain text"


def _texts(output: Any) -> Iterator[str]:
    yield output.get("text", "")
    yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def main(
    notebooks: Annotated[
        list[Path] | None, typer.Argument(help="Notebooks to run; default: all beside this file.")
    ] = None,
) -> None:
    """Run notebooks and write their outputs into them. Exit code 1 if one should not be committed as it is."""
    bad = False
    for given in notebooks or sorted(HERE.glob("*.ipynb")):
        path = given if given.exists() else HERE / given
        typer.echo(f"{path.name} ...", err=True)
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        text = nbformat.writes(tidied(notebook)) + "\n"
        for problem in problems(text):
            typer.echo(f"{path.name}: {problem}", err=True)
            bad = True
        path.write_text(text, encoding="utf-8")
    raise typer.Exit(int(bad))


if __name__ == "__main__":
    typer.run(main)
