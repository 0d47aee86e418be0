"""What a user may set, checked before anything starts.

One frozen model, filled from keywords, a mapping, a JSON file, or the "fa_pool" section of a DeepSpeed
config. Whatever is wrong with it is told in one message: the value given, the rule, the remedy. It knows no
torch, no machine and no model: numbers about the machine are handed in by the caller.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

SECTION = "fa_pool"
MIB = 1024 * 1024
CPU_LIMIT_MIB = 2048
"""``memory_limit_mib`` of a rank on a CPU, if none is set."""
RANK_MIB = 200
"""What a pool rank takes beside its keys, once it computes."""


class FAPoolConfigError(ValueError):
    """A configuration that cannot be used; the message holds every bad key, its rule and its remedy."""


class BaseConfig(BaseModel):
    """How the base ranks of a launch share one model: ``"base"`` in the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tensor_parallel: Literal["none", "megatron", "deepspeed"] | None = Field(
        None,
        description="Who splits the model over base ranks: Megatron-core's layers, DeepSpeed's AutoTP, or none; "
        "null: as init_inference's own tp_size asks, by Megatron-core where it is installed.",
    )
    tensor_parallel_size: int | None = Field(
        None, ge=1, description="Base ranks that share one model; null: init_inference's own tp_size."
    )


class FAPoolConfig(BaseModel):
    """The plugin's settings. Immutable; unknown keys are refused; types are strict ("8" is not 8).

    An int is accepted where a float is expected; a bool never counts as a number.

    Raises:
        FAPoolConfigError: a key is unknown, or a value breaks its rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    enabled: bool = Field(True, description="false: every forward stays local, as without the plugin.")
    pool: Literal["local", "launch", "ray"] = Field(
        "local",
        description="Where pool ranks come from; local: started by the base process on this machine; launch: ranks of "
        "the deepspeed, torchrun, accelerate or MPI launch itself; ray: a standing pool that jobs share.",
    )
    pool_ranks: int = Field(
        1,
        ge=0,
        description="How many pool ranks there are in all; with local, how many each base process starts; with ray, "
        "how many it borrows at most.",
    )
    pool_name: str = Field(
        "fapool", min_length=1, description="With ray: the pool's name, as `fapool pool up --name` gave it."
    )
    ray_address: str | None = Field(
        None, description="With ray: the cluster's address; null: the one that this process or this machine is in."
    )
    idle_keys_s: float | None = Field(
        60.0, gt=0, description="With ray: a rank that is asked nothing for so many seconds may be recalled; null: not."
    )
    pool_placement: Literal["last", "per_node"] = Field(
        "last",
        description="Which ranks of a launch become pool ranks: the last of all, or the last of each node.",
    )
    store_port: int | None = Field(
        None, ge=1, le=65535, description="Where base and pool ranks of a launch meet; null: MASTER_PORT + 1."
    )
    link_key_file: str | None = Field(
        None,
        description="A file with a key of 32 bytes or more that only its user may read (mode 0600), the same on every "
        "machine of a launch: links between machines are authenticated and encrypted with it.",
    )
    insecure: bool = Field(
        False, description="true: links between machines without a key, which all that reach their ports can use."
    )
    base: BaseConfig = Field(
        BaseConfig(tensor_parallel=None, tensor_parallel_size=None),
        description="How the base ranks of a launch share one model; see docs/deepspeed.md.",
    )
    activation: Literal["cost", "length"] = Field(
        "cost",
        description="cost: above the threshold, pooled where the plan predicts that to be faster; length: always.",
    )
    threshold: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        4096,
        description="Tokens; a call whose longest sequence is longer than this may be pooled; auto: where attention "
        "takes longer than the rest of the model and the overhead of pooling, as measured.",
    )
    strict: bool = Field(
        False,
        description="true: a forward above the threshold that would stay local for a reason known beforehand, such as "
        "attention dropout or output_attentions, is refused.",
    )
    profile: str | None = Field(
        None,
        description="A file written by `fapool calibrate`; null: the one kept for this machine and model, or a quick "
        "measurement at the first activation.",
    )
    release_ratio: float = Field(
        0.5, gt=0, le=1, description="The lease goes back once the longest sequence is below this times threshold."
    )
    partition: Literal["line", "query_blocks"] = Field(
        "line",
        description="How a call is cut: one line through all lanes, or every lane at the same fractions.",
    )
    base_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="The base's part of a pooled call; null: the plan's, and without a plan as much as any rank's.",
    )
    blocks: int | None = Field(
        None,
        ge=1,
        description="Blocks of a prompt in flight, so that base and pool work at the same time; 1: no overlap; null: "
        "as many as pay.",
    )
    reduction: Literal["auto", "direct", "tree", "two_level"] = Field(
        "auto",
        description="How partial results of one query return: each to the base, merged on the way by a tree of pool "
        "ranks, or first within each node; auto: the cheapest by the profile.",
    )
    reduction_fan_in: int = Field(2, ge=2, description="Partial results that a rank of a tree merges with its own.")
    key_distribution: Literal["auto", "direct"] = Field(
        "auto", description="How keys that several ranks need reach them: from the base to each, either way."
    )
    timeout_s: float = Field(
        5.0, gt=0, description="Seconds; a pool rank that is silent, or does not get on, for this long is lost."
    )
    spot_check: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of all answers of which the base computes a few random rows once more; a rank that answers "
        "wrongly is given up. 1: of every answer.",
    )
    carrier: Literal["auto", "inline", "shm", "ipc", "nixl"] = Field(
        "auto",
        description="What carries large bodies; inline: the link's socket; shm: memory that both processes map; ipc: "
        "from GPU to GPU; nixl: NIXL, between machines of an insecure launch; auto: between machines inline, on one "
        "ipc where both ends are on GPUs that reach each other, else shm.",
    )
    start_timeout_s: float = Field(
        120.0, gt=0, description="Seconds; a pool rank not ready this long after its start is given up."
    )
    warm_start: bool = Field(
        True,
        description="With local: true: what pool ranks are made of is loaded beside the model, by a process of about "
        "200 MiB, so that the first long sequence finds them ready; false: when they are first needed.",
    )
    kv_block: int = Field(256, ge=1, description="Positions; keys are stored and flushed in blocks of this many.")
    kv_home: Literal["base", "pool"] = Field(
        "base",
        description="Where keys live above the threshold; base: the base keeps all, pool ranks have copies; pool: each "
        "key has one owner, a pool rank or the base, and it is kept nowhere else.",
    )
    kv_redundancy: Literal["recompute", "peer", "host"] = Field(
        "recompute",
        description="With kv_home pool, what a lost rank's keys come back from; recompute: recorded inputs, computed "
        "once more; peer: a second pool rank, which holds a copy; host: memory beside a device, not built yet.",
    )
    turns: int | None = Field(
        None,
        ge=1,
        description="With kv_home pool, parts of a batch that take turns in a decode step: the base computes the rest "
        "of one while owners attend for another; 1: none; null: 2 where the plan expects a gain.",
    )
    wave_mib: int = Field(
        128,
        ge=1,
        description="MiB of activations; with kv_home pool a prompt, or batch of them, that needs more is computed in "
        "waves of positions.",
    )
    memory_limit_mib: int | None = Field(
        None,
        ge=1,
        description="MiB of keys and values one pool rank may hold; null: 2048 on a CPU, on a GPU most of what is free "
        "when the rank starts.",
    )
    training_residency: bool = Field(
        False,
        description="true: pool ranks keep what a training call sent them, as far as memory_limit_mib allows, so that "
        "its backward and gradient checkpointing do not send it again.",
    )
    threads_per_rank: int = Field(
        1, ge=1, description="CPU threads of each pool rank; the base gives them up while it uses the rank."
    )
    trace: str | None = Field(
        None, description="Write a Chrome/Perfetto trace of base and pool ranks to this file; null: none."
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Serve counters to Prometheus on this port of 127.0.0.1; 0: any; null: none."
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise FAPoolConfigError(_message(error)) from None

    @field_validator("pool_ranks")
    @classmethod
    def _enabled_needs_a_rank(cls, pool_ranks: int, info: ValidationInfo) -> int:
        if pool_ranks == 0 and info.data.get("enabled"):
            raise ValueError('no pool rank to pool with; set "enabled": false, or pool_ranks >= 1')
        return pool_ranks

    @field_validator("kv_home")
    @classmethod
    def _checks_need_keys(cls, kv_home: str, info: ValidationInfo) -> str:
        if kv_home == "pool" and info.data.get("spot_check"):
            raise ValueError("spot_check needs keys that the base has itself: set it to 0, or kv_home to base")
        return kv_home

    @field_validator("kv_redundancy")
    @classmethod
    def _a_peer_is_another_rank(cls, kv_redundancy: str, info: ValidationInfo) -> str:
        if kv_redundancy == "peer" and info.data.get("pool_ranks", 2) < 2:
            raise ValueError("a peer is a second pool rank: set pool_ranks >= 2, or kv_redundancy to recompute")
        if kv_redundancy == "host":
            raise ValueError(
                "host keeps a copy beside a device, and models have run on CPUs only, whose memory is the host's: "
                "set recompute or peer"
            )
        return kv_redundancy

    @classmethod
    def load(cls, source: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str] | None) -> FAPoolConfig:
        """Make a config from whatever a user hands over.

        Args:
            source: a config (returned as it is), a mapping, a path of a JSON file, or None for the defaults.
                A mapping or file with a "fa_pool" key (a DeepSpeed config) gives that section only.

        Raises:
            FAPoolConfigError: unreadable, not JSON, not an object, or a setting is wrong; names the file.
        """
        if source is None:
            return cls()
        if isinstance(source, FAPoolConfig):
            return source
        if isinstance(source, Mapping):
            return cls._from_object(source)
        if not isinstance(source, str | os.PathLike):
            raise FAPoolConfigError(
                f"a fa_pool configuration is a mapping, the path of a JSON file, or None, not {source!r}"
            )
        path = os.fspath(source)
        try:
            return cls._from_object(_read_json(path))
        except FAPoolConfigError as error:
            raise FAPoolConfigError(f"{path}: {error}") from None

    @classmethod
    def _from_object(cls, values: Any) -> Self:
        if isinstance(values, Mapping) and SECTION in values:
            values = values[SECTION]
        if not isinstance(values, Mapping):
            raise FAPoolConfigError(
                f'a fa_pool configuration is an object such as {{"threshold": 4096}}, not {_shown(values)}'
            )
        return cls(**{str(key): value for key, value in values.items()})

    @property
    def cpu_limit_mib(self) -> int:
        """MiB of keys and values that a pool rank on a CPU may hold."""
        return self.memory_limit_mib or CPU_LIMIT_MIB

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values; load(config.to_dict()) == config."""
        return self.model_dump()


def section_of(source: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str]) -> FAPoolConfig | None:
    """The settings in a DeepSpeed config; None if it has no "fa_pool" section. Raises as :meth:`FAPoolConfig.load`."""
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        try:
            content = _read_json(path)
        except FAPoolConfigError as error:
            raise FAPoolConfigError(f"{path}: {error}") from None
        return FAPoolConfig.load(path) if isinstance(content, Mapping) and SECTION in content else None
    if isinstance(source, Mapping) and SECTION not in source:
        return None
    return FAPoolConfig.load(source)


def check_machine(config: FAPoolConfig, available_bytes: int) -> None:
    """Refuse more local pool ranks on a CPU than memory can hold.

    Args:
        config: the settings; nothing is asked of the machine when they are not enabled.
        available_bytes: memory that is free for the pool ranks, in bytes.

    Raises:
        FAPoolConfigError: pool_ranks * memory_limit_mib is more than that; says what would fit.
    """
    each_mib = config.cpu_limit_mib + RANK_MIB
    needed_mib, available_mib = config.pool_ranks * each_mib, available_bytes // MIB
    if not config.enabled or needed_mib <= available_mib:
        return
    fitting_ranks = available_mib // each_mib
    fitting_mib = max(0, available_mib // config.pool_ranks - RANK_MIB)
    remedies = [f"pool_ranks <= {fitting_ranks}"] if fitting_ranks else []
    remedies += [f"memory_limit_mib <= {fitting_mib}"] if fitting_mib else []
    remedies += ['"enabled": false']
    raise FAPoolConfigError(
        f"pool_ranks ({config.pool_ranks}) * (memory_limit_mib ({config.cpu_limit_mib}) + {RANK_MIB} of the process)"
        f" = {needed_mib} MiB,"
        f" but {available_mib} MiB of memory are available, enough for {fitting_ranks} such pool ranks;"
        f" set {' or '.join(remedies)}"
    )


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise FAPoolConfigError(f"cannot be read ({error.strerror}); give the path of a JSON file") from None
    except ValueError as error:  # both what is not UTF-8 and what is not JSON
        raise FAPoolConfigError(f"is not JSON: {error}") from None


def _message(error: ValidationError) -> str:
    """One line per bad key, in place of pydantic's several."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        inside: type[BaseModel] = FAPoolConfig
        path, (key, *deeper) = [], map(str, problem["loc"])
        if key == "base" and deeper:
            inside, path, key = BaseConfig, [key], deeper[0]
        schema = inside.model_json_schema()["properties"]
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key.lower(), schema, n=1)
            text = "unknown key; " + (f'did you mean "{close[0]}"?' if close else "leave it out")
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
        else:
            text = f"must be {_rule(schema[key])}; {_remedy(inside, key, problem['input'], schema[key])}"
        name = ".".join([*path, key])
        lines[name] = f"{name} = {_shown(problem['input'])}: {text}"
    head = "fa_pool configuration refused:"
    if len(lines) == 1:
        return f"{head} {next(iter(lines.values()))}"
    return "\n  ".join([head, *lines.values()])


def _rule(schema: Mapping[str, Any]) -> str:
    """A field's JSON schema in words, so that the words cannot differ from the check."""
    if "anyOf" in schema:
        return " or ".join(_rule(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return "an object such as " + json.dumps(schema["default"])
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    names["string"] = "a text"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return " ".join([names[schema["type"]], " and ".join(bounds)]).strip()


def _remedy(model: type[BaseModel], key: str, value: Any, schema: Mapping[str, Any]) -> str:
    default = json.dumps(schema["default"])
    if isinstance(value, str):
        try:
            # Only a value that would be right bare: 8, 0.5, true.
            model(**{key: json.loads(value)})
        except ValueError:
            pass
        else:
            return f"write {value} without the quotes"
    return f"leave it out for the default, {default}"


def _shown(value: Any) -> str:
    """The value as its JSON would be, cut to a readable length."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
