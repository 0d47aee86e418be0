"""The hardware files against public figures and sums made by hand."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest

from fapool_plugin.plan.hardware import Hardware
from fapool_plugin.plan.profile import ProfileError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "hardware").glob("*.json"))


@pytest.fixture(scope="module")
def a100() -> Hardware:
    return Hardware.load(ROOT / "configs" / "hardware" / "a100-sxm.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_loads_and_says_where_it_is_from(path: Path, tmp_path: Path) -> None:
    made = Hardware.load(path)
    assert made.name == path.stem
    assert "aiconfigurator-core 0.12.0" in made.source
    assert made.licence == "Apache-2.0"
    for kind in ("prefill", "decode"):
        assert {"8k to 16k held out", "batches 64 and 512 held out", "in this file"} <= made.errors[kind].keys()
        assert made.errors[kind]["in this file"]["largest"] < 0.001
    made.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_products_are_the_tables_and_between_them(a100: Hardware) -> None:
    table = a100.gemm
    m, n, k = (values.index(value) for values, value in ((table.m, 8192), (table.n, 1536), (table.k, 4096)))
    assert table.micros[m][n][k] == pytest.approx(450.2, rel=0.01), "vLLM's GEMM, 8192 x 1536 x 4096"
    assert a100.gemm_s(8192, 1536, 4096) == pytest.approx(table.micros[m][n][k] * 1e-6)
    between = sqrt(table.micros[m][n][k] * table.micros[m - 1][n][k]) * 1e-6
    assert a100.gemm_s(sqrt(8192 * table.m[m - 1]), 1536, 4096) == pytest.approx(between)
    assert a100.gemm_s(4 * 8192, 1536, 4096) == pytest.approx(4 * a100.gemm_s(8192, 1536, 4096))


def test_all_reduces_count_bytes_where_the_table_counts_elements(a100: Hardware) -> None:
    """33,554,432 elements of fp16 on 8 GPUs are 0.5953 ms there; they are 8,192 tokens of 4,096 numbers."""
    assert a100.all_reduce_s(8, 8192 * 4096 * 2) == pytest.approx(0.5953e-3, rel=1e-4)
    assert a100.all_reduce_s(1, 1e9) == 0
    largest = a100.all_reduce[8][-1]
    assert a100.all_reduce_s(8, 3 * largest[0]) == pytest.approx(3 * largest[1])
    with pytest.raises(ValueError, match="all-reduces of 2, 4, 8 GPUs, none of 16"):
        a100.all_reduce_s(16, 1)


def test_what_is_not_in_the_tables_is_scaled_and_marked(a100: Hardware) -> None:
    known, half = (a100.attention_s("decode", 4, 4, dim, 16, 4096) for dim in (128, 64))
    assert half == pytest.approx(known / 2)
    assert a100.marks("decode", 4, 4, 128, 16, 4096) == []
    assert a100.marks("decode", 4, 4, 64, 16, 4096) == ["head dim 64 has no table: scaled from 128"]
    assert a100.marks("prefill", 4, 4, 128, 1, 32_768) == ["prefill of more than 16384 tokens is extrapolated"]
    (mark,) = a100.marks("decode", 4, 4, 128, 1024, 4096)
    assert mark == "decode of more than 2097152 keys in all is extrapolated"
    # As many lanes of another batch.
    (mark,) = a100.marks("decode", 12, 12, 128, 4, 4096)
    assert mark == "12 query and 12 KV heads have no table: scaled from 8 and 8"
    assert a100.attention_s("decode", 12, 12, 128, 4, 999) == a100.attention_s("decode", 8, 8, 128, 6, 999)


def test_damage_is_told(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text(FILES[0].read_text()[:1000])
    with pytest.raises(ProfileError, match="is damaged at its text"):
        Hardware.load(tmp_path / "half.json")
    with pytest.raises(ProfileError, match="cannot be read"):
        Hardware.load(tmp_path / "none.json")
