"""Who is not meant gets no link and no byte: another user of the machine, and other machines without the key."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.pool.process import end, start
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.sockets import connect, listen
from tests.blocks import save_long

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, or two machines"),
]
ROOT = Path(__file__).parents[2]
_NOBODY = 65534


def _what_a_stranger_gets(path: str) -> str:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    try:
        sock.connect(path)
        sock.sendall(bytes(256))
        return f"received {sock.recv(4096)!r}"
    except OSError as error:
        return type(error).__name__


def test_another_user_of_the_machine_gets_no_link_and_no_byte() -> None:
    folder = tempfile.mkdtemp(prefix="fapool-")
    listener, address = listen(f"unix:{folder}/1")
    with listener:
        worker = start("listen", [listener], FAPoolConfig(memory_limit_mib=16), device="cpu")
    loop = Loop()
    try:
        mine = Link(connect(address, 30.0), loop, name="mine", timeout_s=5, asks=True)
        mine.wait_until_heard(60.0)

        def stranger() -> str:
            """In a child that was forked: another user may not be able to start an interpreter here."""
            read, write = os.pipe()
            child = os.fork()
            if not child:
                os.setgroups([])
                os.setresgid(_NOBODY, _NOBODY, _NOBODY)
                os.setresuid(_NOBODY, _NOBODY, _NOBODY)
                os.write(write, _what_a_stranger_gets(f"{folder}/1").encode())
                os._exit(0)
            os.close(write)
            assert os.waitpid(child, 0)[1] == 0
            with open(read, encoding="utf-8") as told:
                return told.read()

        assert stranger() == "PermissionError", "the folder is its user's"
        os.chmod(folder, 0o755)
        os.chmod(f"{folder}/1", 0o666)
        assert stranger() in ("received b''", "ConnectionResetError", "BrokenPipeError"), "the other end is looked at"
        assert not mine.lost
        mine.close()
    finally:
        end(worker, 0.0)
        loop.close()
        shutil.rmtree(folder)


_SCRIPT = """
import json, sys, torch, warnings
from fapool_plugin import FAPoolForCausalLM
torch.set_num_threads(1)
section = json.load(open(sys.argv[sys.argv.index("--deepspeed_config") + 1]))["fa_pool"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = FAPoolForCausalLM.from_pretrained(sys.argv[1], fa_pool=section, dtype=torch.float32).eval()
    ids = 3 + torch.arange(int(sys.argv[2]))[None] % 50
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
stats = model.fa_pool.stats()
print(json.dumps([[rank["carrier"], rank["bytes_sent"]] for rank in stats["ranks"]]))
told = [str(one.message) for one in caught if "fa_pool" in str(one.message)]
plain = FAPoolForCausalLM.from_pretrained(sys.argv[1], fa_pool={"enabled": False}, dtype=torch.float32).eval()
want = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
print(json.dumps([torch.equal(tokens, want), stats["decode"]["pooled_calls"], stats["faults"], told]))
model.fa_pool.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2; each sees mounts of its own."""
    names = f"fapool{os.getpid()}a", f"fapool{os.getpid()}b"

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0

    try:
        made = all(ip("netns", "add", name) for name in names)
        made = made and ip(
            "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1]
        )
        for number, name in enumerate(names, 1):
            made = made and ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            made = made and ip("-n", name, "link", "set", "cable", "up") and ip("-n", name, "link", "set", "lo", "up")
        if not made:
            pytest.skip("no network namespaces here")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def launch(
    machines: tuple[str, str],
    model: Path,
    tmp_path: Path,
    sections: tuple[dict[str, Any], dict[str, Any]],
    tokens: int = 200,
) -> tuple[list[int], str, str]:
    """A base rank on the first machine, a pool rank on the second: (exit codes, what the base printed, all errors)."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    ranks = []
    for rank, (name, section) in enumerate(zip(machines, sections, strict=True)):
        config = tmp_path / f"config{rank}.json"
        common = {"pool": "launch", "pool_ranks": 1, "threshold": 64, "activation": "length", "memory_limit_mib": 64}
        config.write_text(json.dumps({"fa_pool": common | {"timeout_s": 3.0, "start_timeout_s": 60.0} | section}))
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "fapool_plugin.run", str(script), str(model)]
        command.append(str(tokens))
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29544", "PYTHONPATH": path}
        told = subprocess.PIPE
        command += ["--deepspeed_config", str(config)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=told, stderr=told, text=True, cwd=tmp_path))
    try:
        said = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for one in ranks:
            one.kill()
            one.wait()
    return [one.returncode for one in ranks], said[0][0], "".join(errors for _, errors in said)


def key(tmp_path: Path, number: int) -> str:
    path = tmp_path / f"key{number}"
    path.write_bytes(bytes([number]) * 32)
    path.chmod(0o600)
    return str(path)


def test_two_machines_without_a_key_are_refused(machines: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    codes, _, errors = launch(machines, folder, tmp_path, ({}, {}))
    assert 0 not in codes, errors
    assert "set link_key_file to it" in errors
    assert "10.77.0.1" in errors


def test_two_machines_with_one_key_pool(machines: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    section = {"link_key_file": key(tmp_path, 1)}
    codes, said, errors = launch(machines, folder, tmp_path, (section, section))
    assert codes == [0, 0], errors
    equal, pooled, faults, told = json.loads(said.splitlines()[-1])
    assert equal
    assert pooled > 0, told
    assert faults == 0, told


def test_two_machines_with_different_keys_compute_without_each_other(
    machines: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    sections = {"link_key_file": key(tmp_path, 1)}, {"link_key_file": key(tmp_path, 2)}
    codes, said, errors = launch(machines, folder, tmp_path, sections)
    assert codes[0] == 0, errors
    equal, pooled, _, told = json.loads(said.splitlines()[-1])
    assert equal
    assert pooled == 0
    assert "another link key" in str(told)


def test_insecure_links_between_machines_are_warned_of_once(
    machines: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    codes, said, errors = launch(machines, folder, tmp_path, ({"insecure": True}, {"insecure": True}))
    assert codes == [0, 0], errors
    equal, pooled, faults, _ = json.loads(said.splitlines()[-1])
    assert equal
    assert (pooled > 0, faults) == (True, 0)
    assert errors.count("have no key (insecure: true)") == 1
