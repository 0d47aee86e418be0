"""Other systems beside the pool: what `fapool bench` compares, and two ranks of theirs in turns with it.

    python -m examples.peers prefill --tokens 8192
    python -m examples.peers attention --tokens 8192

transformers' tensor parallelism, DeepSpeed's AutoTP and Ulysses, and a zigzag ring. Their models have to be divisible
by two; a peer that cannot do the work is shown with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch import distributed as dist

from fapool_plugin.integrations.huggingface.bench import Make, plain_model, timed_prefill
from fapool_plugin.kernels.forward import attend, merge_
from fapool_plugin.tools.bench import command
from fapool_plugin.tools.bench.attention import inputs
from fapool_plugin.tools.bench.contenders import Contender
from fapool_plugin.tools.bench.report import Report
from fapool_plugin.tools.bench.turns import compare
from fapool_plugin.tools.demo import Screen

PREFILL = {
    "transformers TP, 2 x 1": "examples.peers.tensor_parallel_prefill",
    "DeepSpeed AutoTP, 2 x 1": "examples.peers.autotp_prefill",
    "DeepSpeed Ulysses, 2 x 1": "examples.peers.ulysses_prefill",
}
_SEQUENCE_PARALLEL = "fapool_bench_ulysses"
_WARM_TOKENS = 256

app = typer.Typer(help="What fapool bench compares, and other systems.", no_args_is_help=True)
Runs = Annotated[int, typer.Option(help="Turns of each contender.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write every number to this file.")]


@app.command()
def prefill(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8192,
    model: Annotated[str, typer.Option(help="Model folder, or a small random Llama.")] = command.RANDOM,
    threshold: Annotated[int, typer.Option(help="Sequences longer than so many tokens are pooled.")] = 4096,
    runs: Runs = 3,
    json_file: Json = None,
) -> None:
    """One long prompt: sdpa, the pool with 1 + 1 threads, and two ranks of each peer."""
    with command.told_errors():
        fa_pool = command.checked(pool_ranks=1, threshold=threshold, activation="length")
        with command.prepared(model, tokens) as (screen, work):
            fa_pool |= {"profile": command.profile_file(work["model"], None, 1, 1, screen)}
            plain = work | {"warm": min(tokens, _WARM_TOKENS)}
            pooled = work | {"warm": min(tokens, threshold + _WARM_TOKENS), "fa_pool": fa_pool}
            peers = [Contender(label, make, plain, processes=2, is_peer=True) for label, make in PREFILL.items()]
            ours = command.ours("prefill", plain, pooled, 1, 1)
            results = compare([[contender] for contender in [*ours, *peers]], runs, screen)
        options = {"model": model, "tokens": tokens, "threshold": threshold}
        command.finish(Report("prefill", options, "a prompt", results), json_file, None)


@app.command()
def attention(
    tokens: Annotated[int, typer.Option(help="Queries and keys of the one sequence.")] = 8192,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Of queries, keys and values.")] = 64,
    ranks: Annotated[int, typer.Option(help="Pool ranks, and ranks of the ring.")] = 2,
    runs: Runs = 3,
    json_file: Json = None,
) -> None:
    """One causal attention call, fp32: alone, through a pool, with threads, and in a ring."""
    with command.told_errors():
        shape = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        peer = Contender(f"zigzag ring of {ranks}", "examples.peers.ring", shape, processes=ranks, is_peer=True)
        contenders = [*command.attention_contenders(shape, ranks), peer]
        with Screen() as screen:
            results = compare([[contender] for contender in contenders], runs, screen)
        command.finish(Report("attention", shape, "a call", results), json_file, None)


def tensor_parallel_prefill(model: str, ids: list[int], warm: int) -> Make:
    """transformers' own tensor parallelism over all ranks of the process group."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    return timed_prefill(plain_model(model, distributed_config=config), ids, warm)


def autotp_prefill(model: str, ids: list[int], warm: int) -> Make:
    """Linear layers split over all ranks by DeepSpeed's AutoTP."""
    import deepspeed

    _join()
    engine = deepspeed.init_inference(
        plain_model(model),
        tensor_parallel={"tp_size": dist.get_world_size()},
        dtype=torch.float32,
        # Its own kernels exist for CUDA only.
        replace_with_kernel_inject=False,
    )
    return timed_prefill(engine.module, ids, warm)


def ulysses_prefill(model: str, ids: list[int], warm: int) -> Make:
    """DeepSpeed Ulysses: each rank has the whole model and a piece of the prompt; around attention pieces become heads.

    The last rank answers with the logits. Raises ValueError if the pieces would not be of one length.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    rank, ranks = dist.get_rank(), dist.get_world_size()
    piece, rest = divmod(len(ids), ranks)
    if rest:
        raise ValueError(f"{len(ids)} tokens cannot be divided by {ranks} ranks")
    loaded = plain_model(model)
    heads = loaded.config.num_key_value_heads
    scale = loaded.config.hidden_size // loaded.config.num_attention_heads
    scale = getattr(loaded.config, "head_dim", None) or scale

    def local(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        return attend(q_BSHD, k_BTKD, v_BTKD, softmax_scale=scale**-0.5, causal=True)[0].contiguous()

    exchanged = exchange_heads(local, heads)

    def function(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        return exchanged(*(x.transpose(1, 2).contiguous() for x in (query, key, value))), None

    AttentionInterface.register(_SEQUENCE_PARALLEL, function)
    AttentionMaskInterface.register(_SEQUENCE_PARALLEL, lambda *_, **__: None)
    loaded.set_attn_implementation(_SEQUENCE_PARALLEL)
    first = rank * piece
    make = timed_prefill(loaded, ids[first : first + piece], min(warm, piece), first_position=first)

    def turn() -> tuple[float, Tensor | None, dict[str, Any]]:
        seconds, logits, facts = make()
        return seconds, logits if rank == ranks - 1 else None, facts

    return turn


def exchange_heads(local: Callable[..., Tensor], kv_heads: int) -> Callable[..., Tensor]:
    """Attention of (q_BSHD, k_BTKD, v_BTKD) where each rank holds a piece of S and T, by DeepSpeed's own
    DistributedAttention: all-to-all to whole sequences of a part of the heads, ``local``, and back."""
    from deepspeed import comm
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    _join()
    # As its engine would for training; ranks with unequal numbers of heads find their own by it.
    groups.mesh_device = comm.initialize_mesh_device((1, dist.get_world_size()), ("data_parallel", "sequence_parallel"))
    ranks = groups.mesh_device.get_group(mesh_dim="sequence_parallel")
    attention = DistributedAttention(local, ranks, scatter_idx=2, gather_idx=1, num_kv_heads=kv_heads)

    def call(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        return attention(q_BSHD, k_BTKD, v_BTKD, batch_dim_idx=0)

    return call


def _join() -> None:
    import deepspeed

    if not torch.cuda.is_available():
        # It would be compiled at every start, and knows only ranks of one whole machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl")


def ring(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Callable[[], tuple[float, Tensor, dict[str, Any]]]:
    """Ring attention (Liu et al. 2023), in the zigzag order of ring-flash-attention (Zhu 2024), which balances a causal
    mask.

    The sequence is cut into 2 W chunks, and of W ranks rank r has chunks r and 2 W - 1 - r from the start; its result
    stays there, too. Keys and values travel round, the next ones while the present ones are computed.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q_BSHD, k_BTKD, v_BTKD = inputs(tokens, heads, kv_heads, head_dim)
    edges = [tokens * index // (2 * ranks) for index in range(2 * ranks + 1)]

    def chunks_of(owner: int) -> tuple[int, int]:
        return owner, 2 * ranks - 1 - owner

    def cut(x: Tensor, chunk: int) -> Tensor:
        return x[:, edges[chunk] : edges[chunk + 1]].contiguous()

    mine = {chunk: cut(q_BSHD, chunk) for chunk in chunks_of(rank)}
    held = [x for chunk in chunks_of(rank) for x in (cut(k_BTKD, chunk), cut(v_BTKD, chunk))]

    def turn() -> tuple[float, Tensor, dict[str, Any]]:
        dist.barrier()
        began = time.perf_counter()
        out = {chunk: torch.zeros_like(q) for chunk, q in mine.items()}
        lse = {chunk: q.new_full((1, heads, q.shape[1]), -torch.inf) for chunk, q in mine.items()}
        present = held
        for step in range(ranks):
            owner = (rank - step) % ranks
            works: list[Any] = []
            if step + 1 < ranks:
                coming = [
                    k_BTKD.new_empty(1, edges[c + 1] - edges[c], kv_heads, head_dim)
                    for c in chunks_of((owner - 1) % ranks)
                    for _ in "kv"
                ]
                works += [dist.isend(x, (rank + 1) % ranks, tag=at) for at, x in enumerate(present)]
                works += [dist.irecv(x, (rank - 1) % ranks, tag=at) for at, x in enumerate(coming)]
            for at, key_chunk in enumerate(chunks_of(owner)):
                k, v = present[2 * at : 2 * at + 2]
                for chunk, q in mine.items():
                    if key_chunk <= chunk:
                        part = attend(q, k, v, softmax_scale=head_dim**-0.5, causal=key_chunk == chunk)
                        merge_(out[chunk], lse[chunk], *part)
            for work in works:
                work.wait()
            if step + 1 < ranks:
                present = coming
        seconds = time.perf_counter() - began
        whole = torch.zeros_like(q_BSHD)
        for chunk, part_out in out.items():
            whole[:, edges[chunk] : edges[chunk + 1]] = part_out
        dist.all_reduce(whole)
        return seconds, whole, {}

    return turn


if __name__ == "__main__":
    app()
