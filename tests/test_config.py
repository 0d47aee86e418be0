"""Every setting's default, type and bounds, and that each refusal says value, rule and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fapool_plugin.config import MIB, BaseConfig, FAPoolConfig, FAPoolConfigError, check_machine, section_of

DEFAULTS = {
    "enabled": True,
    "pool": "local",
    "pool_ranks": 1,
    "pool_placement": "last",
    "store_port": None,
    "pool_name": "fapool",
    "ray_address": None,
    "idle_keys_s": 60.0,
    "link_key_file": None,
    "insecure": False,
    "base": {"tensor_parallel": None, "tensor_parallel_size": None},
    "threshold": 4096,
    "release_ratio": 0.5,
    "partition": "line",
    "base_share": None,
    "blocks": None,
    "activation": "cost",
    "strict": False,
    "profile": None,
    "reduction": "auto",
    "reduction_fan_in": 2,
    "key_distribution": "auto",
    "trace": None,
    "metrics_port": None,
    "spot_check": 0.0,
    "carrier": "auto",
    "timeout_s": 5.0,
    "start_timeout_s": 120.0,
    "warm_start": True,
    "kv_block": 256,
    "kv_home": "base",
    "kv_redundancy": "recompute",
    "turns": None,
    "wave_mib": 128,
    "memory_limit_mib": None,
    "training_residency": False,
    "threads_per_rank": 1,
}
# Per setting: values just inside its rule, and values just outside of it or of another type.
CASES: dict[str, tuple[list[Any], list[Any]]] = {
    "enabled": ([True, False], [1, 0, "true", None]),
    "pool": (["local", "launch", "ray"], ["attach", "", None, 1]),
    "pool_name": (["shared"], ["", None, 1]),
    "ray_address": (["auto", "10.0.0.1:6379", None], [1, True]),
    "idle_keys_s": ([0.1, 60, None], [0, -1, "60", True, float("inf")]),
    "pool_ranks": ([1, 7], [0, -1, 1.0, "1", True, None]),
    "pool_placement": (["last", "per_node"], ["first", None, 1]),
    "store_port": ([1, 29501, 65535, None], [0, 65536, "29501", True]),
    "link_key_file": (["/etc/fapool.key", None], [1, True]),
    "insecure": ([True, False], [0, "false", None]),
    "spot_check": ([0, 0.02, 1, 1.0], [-0.1, 1.1, "0.5", None, True, float("nan")]),
    "base": ([BaseConfig(tensor_parallel="none", tensor_parallel_size=None)], [None, 1, "megatron"]),
    "activation": (["cost", "length"], ["auto", None, 1]),
    "threshold": ([0, 1, 10**7, "auto"], [-1, 4096.0, "4096", "Auto", True, None]),
    "strict": ([True, False], [0, "false", None]),
    "profile": (["profile.json", None], [1, True, {}]),
    "blocks": ([1, 8, None], [0, -1, 1.5, "2", True]),
    "reduction": (["auto", "direct", "tree", "two_level"], ["ring", None, 1]),
    "reduction_fan_in": ([2, 8], [1, 0, "2", None]),
    "key_distribution": (["auto", "direct"], ["chain", "tree", None, 1]),
    "trace": (["trace.json", None], [1, True]),
    "metrics_port": ([0, 9100, 65535, None], [-1, 65536, "9100", True]),
    "release_ratio": ([1e-9, 0.5, 1.0, 1], [0, 0.0, 1.0001, -0.5, "0.5", True, None, float("nan")]),
    "partition": (["line", "query_blocks"], ["lines", "LINE", None, 0]),
    "base_share": ([None, 0, 0.0, 0.999], [1, 1.0, -0.001, "0.5", True, float("nan")]),
    "timeout_s": ([0.001, 5, 60.0], [0, 0.0, -1, "5", True, None, float("inf")]),
    "carrier": (["auto", "inline", "shm", "ipc", "nixl"], ["rdma", None, 1]),
    "start_timeout_s": ([0.001, 120], [0, -1.0, "120", True, None, float("inf")]),
    "warm_start": ([True, False], [1, "true", None]),
    "kv_block": ([1, 64], [0, -256, 256.0, "256", True, None]),
    "kv_home": (["base", "pool"], ["host", True, None, 1]),
    "kv_redundancy": (["recompute"], ["none", "host", True, None, 1]),
    "turns": ([1, 4, None], [0, -1, 2.0, "2", True]),
    "wave_mib": ([1, 10**6], [0, -1, 2.0, "2", True, None]),
    "memory_limit_mib": ([1, 10**6], [0, -1, 2048.0, "2048", True]),
    "training_residency": ([True, False], [1, 0, "true", None]),
    "threads_per_rank": ([1, 64], [0, -1, 1.0, "1", True, None]),
}
ACCEPTED = [(key, value) for key, (good, _) in CASES.items() for value in good]
REFUSED = [(key, value) for key, (_, bad) in CASES.items() for value in bad]


def refusal(source: Any) -> str:
    with pytest.raises(FAPoolConfigError) as caught:
        FAPoolConfig.load(source)
    message = str(caught.value)
    assert "pydantic" not in message, message
    assert "validation error" not in message, message
    assert caught.value.__cause__ is None, caught.value.__cause__
    return message


def test_defaults_are_the_documented_ones() -> None:
    assert FAPoolConfig().to_dict() == DEFAULTS
    assert FAPoolConfig.load(None) == FAPoolConfig.load({}) == FAPoolConfig()


def test_every_setting_is_described_and_tried_here() -> None:
    assert set(CASES) == set(FAPoolConfig.model_fields)
    for key, field in FAPoolConfig.model_fields.items():
        assert field.description, key
        assert "\n" not in field.description, key


@pytest.mark.parametrize(("key", "value"), ACCEPTED)
def test_accepted_values_are_kept(key: str, value: Any) -> None:
    assert getattr(FAPoolConfig.load({key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_refused_values_are_shown_with_rule_and_remedy(key: str, value: Any) -> None:
    message = refusal({key: value})
    assert f"{key} = {json.dumps(value)}: " in message, message
    assert "\n" not in message, message
    assert any(remedy in message for remedy in ("leave it out", "without the quotes", "set ")), message


def test_rules_in_words() -> None:
    assert "must be a number > 0 and <= 1; leave it out for the default, 0.5" in refusal({"release_ratio": 2})
    assert "must be a number >= 0 and < 1 or null" in refusal({"base_share": 1})
    assert 'must be "line" or "query_blocks"' in refusal({"partition": "rings"})
    assert 'must be a whole number >= 0 or "auto"; write 8 without the quotes' in refusal({"threshold": "8"})
    assert "without the quotes" not in refusal({"threshold": "-8"})


def test_an_int_counts_as_a_float() -> None:
    timeout_s = FAPoolConfig(timeout_s=3).timeout_s
    assert isinstance(timeout_s, float)
    assert timeout_s == 3.0


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("treshold", "threshold"),
        ("Threshold", "threshold"),
        ("pool_rank", "pool_ranks"),
        ("timeout", "timeout_s"),
    ],
)
def test_an_unknown_key_names_the_nearest(wrong: str, right: str) -> None:
    assert f'{wrong} = 1: unknown key; did you mean "{right}"?' in refusal({wrong: 1})


@pytest.mark.parametrize("key", ["zzz", "self", "kv_place", 7])
def test_a_key_like_no_other_is_unknown_too(key: Any) -> None:
    assert f"{key} = 1: unknown key" in refusal({key: 1})


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ({"tensor_parallel": "megatro"}, 'base.tensor_parallel = "megatro": must be "none" or "megatron" or'),
        (
            {"tensor_parallel_size": "2"},
            'base.tensor_parallel_size = "2": must be a whole number >= 1 or null; write 2',
        ),
        ({"tensor_parallel_size": 0}, "base.tensor_parallel_size = 0: must be"),
        ({"tensor_parallell": "none"}, 'base.tensor_parallell = "none": unknown key; did you mean "tensor_parallel"?'),
    ],
)
def test_keys_of_base_are_named_with_it(base: dict[str, Any], told: str) -> None:
    assert told in refusal({"base": base})


def test_base_is_kept() -> None:
    config = FAPoolConfig.load({"base": {"tensor_parallel": "megatron", "tensor_parallel_size": 2}})
    assert (config.base.tensor_parallel, config.base.tensor_parallel_size) == ("megatron", 2)
    assert FAPoolConfig.load(json.loads(json.dumps(config.to_dict()))) == config


def test_a_section_is_told_from_a_config_without_one(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"fa_pool": {"pool_ranks": 3}}')
    assert section_of(path) == section_of({"fa_pool": {"pool_ranks": 3}}) == FAPoolConfig(pool_ranks=3)
    path.write_text('{"train_batch_size": 8}')
    assert section_of(path) is section_of({"train_batch_size": 8}) is None
    path.write_text('{"fa_pool": {"pool_rank": 3}}')
    with pytest.raises(FAPoolConfigError, match=f"^{path}: .*did you mean"):
        section_of(path)


def test_all_bad_keys_stand_in_one_message() -> None:
    message = refusal({"treshold": 1, "pool_ranks": 0, "kv_block": "64", "enabled": True, "timeout_s": 1})
    lines = message.splitlines()
    assert len(lines) == 4, message
    for key in ("treshold", "pool_ranks", "kv_block"):
        assert sum(line.startswith(f"  {key} = ") for line in lines) == 1, message


def test_no_pool_rank_needs_enabled_false() -> None:
    message = refusal({"pool_ranks": 0})
    assert 'set "enabled": false, or pool_ranks >= 1' in message, message
    assert FAPoolConfig.load({"pool_ranks": 0, "enabled": False}).pool_ranks == 0
    assert "pool_ranks = -1" in refusal({"pool_ranks": -1, "enabled": False})


def test_keywords_are_checked_like_a_mapping() -> None:
    with pytest.raises(FAPoolConfigError, match="threads_per_rank = 0: must be a whole number >= 1"):
        FAPoolConfig(threads_per_rank=0)


def test_a_config_is_frozen_and_returned_as_it_is() -> None:
    config = FAPoolConfig(threshold=10)
    assert FAPoolConfig.load(config) is config
    with pytest.raises(ValidationError, match="frozen"):
        config.threshold = 11


def test_to_dict_round_trips_also_as_json() -> None:
    config = FAPoolConfig(threshold=0, base_share=0.25, partition="query_blocks", enabled=False, pool_ranks=0)
    assert FAPoolConfig.load(config.to_dict()) == config
    assert FAPoolConfig.load(json.loads(json.dumps(config.to_dict()))) == config


def test_a_path_reads_json(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    path.write_text('{"threshold": 128, "release_ratio": 1}')
    expected = FAPoolConfig(threshold=128, release_ratio=1)
    assert FAPoolConfig.load(path) == FAPoolConfig.load(str(path)) == expected


def test_a_deepspeed_config_gives_its_section(tmp_path: Path) -> None:
    deepspeed = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "fa_pool": {"pool_ranks": 3}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(deepspeed))
    assert FAPoolConfig.load(path) == FAPoolConfig.load(deepspeed) == FAPoolConfig(pool_ranks=3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"{threshold: 1}", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"[1, 2]", "is an object"),
        (b"null", "is an object"),
        (b'{"fa_pool": true}', "is an object"),
        (b'{"fa_pool": null}', "is an object"),
        (b'{"fa_pool": {"treshold": 1}}', 'did you mean "threshold"?'),
        (b'{"timeout_s": Infinity}', "timeout_s = Infinity"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "pool.json"
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: "), message
    assert reason in message, message


def test_another_source_is_refused() -> None:
    assert "not [1]" in refusal([1])
    assert "not True" in refusal(True)


def test_memory_decides_how_many_local_ranks_fit() -> None:
    config = FAPoolConfig(pool_ranks=5, memory_limit_mib=800)
    check_machine(config, 5000 * MIB)
    with pytest.raises(FAPoolConfigError) as caught:
        check_machine(config, 5000 * MIB - 1)
    message = str(caught.value)
    for part in ("(5)", "(800)", "5000 MiB", "4999 MiB", "pool_ranks <= 4", "memory_limit_mib <= 799"):
        assert part in message, f"{part} is not in: {message}"
    check_machine(FAPoolConfig(pool_ranks=4, memory_limit_mib=800), 5000 * MIB - 1)
    check_machine(FAPoolConfig(pool_ranks=5, memory_limit_mib=799), 5000 * MIB - 1)


def test_memory_too_small_for_one_rank() -> None:
    with pytest.raises(FAPoolConfigError, match=r"enough for 0 .*set memory_limit_mib <= 100 or"):
        check_machine(FAPoolConfig(), 300 * MIB)
    with pytest.raises(FAPoolConfigError, match=r'ranks; set "enabled": false$'):
        check_machine(FAPoolConfig(), 0)
    check_machine(FAPoolConfig(enabled=False), 0)
