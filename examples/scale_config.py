"""Make a launch's configuration small enough for the machine at hand: a thinner model, fewer ranks, a lower threshold.

    python examples/scale_config.py configs/paper_8base_32pool.json small.json --divide 16 --base 2 --pool 2
    deepspeed --num_gpus 4 --module fapool_plugin.run examples/generate_deepspeed.py \\
        --deepspeed_config small.json --prompt-tokens 600
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fapool_plugin.config import FAPoolConfig

DIVIDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def scaled(config: dict[str, Any], divide: int, base: int, pool: int) -> dict[str, Any]:
    """The same configuration, every width and the threshold divided, with so many base and pool ranks.

    Raises:
        ValueError: a width cannot be divided; FAPoolConfigError is one.
    """
    section = dict(config["fa_pool"], pool_ranks=pool)
    section["threshold"] = section["threshold"] // divide
    section["base"] = dict(section.get("base", {}), tensor_parallel_size=base)
    FAPoolConfig.load(section)
    model = dict(config["model"])
    for name in DIVIDED:
        if model[name] % divide:
            raise ValueError(f"{name} = {model[name]} cannot be divided by {divide}: give a power of two up to 32")
        model[name] //= divide
    return config | {"model": model, "fa_pool": section}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a configuration with a model section")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--divide", type=int, default=16)
    parser.add_argument("--base", type=int, default=2, help="base ranks that share the model")
    parser.add_argument("--pool", type=int, default=2, help="pool ranks")
    given = parser.parse_args()
    config = json.loads(given.config.read_text(encoding="utf-8"))
    try:
        small = scaled(config, given.divide, given.base, given.pool)
    except (KeyError, ValueError) as error:
        parser.error(f"{given.config}: {error}")
    given.out.write_text(json.dumps(small, indent=2) + "\n", encoding="utf-8")
    print(f"{given.out}: {small['model']['hidden_size']} wide; start {given.base + given.pool} ranks")


if __name__ == "__main__":
    main()
