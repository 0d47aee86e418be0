"""Serve short and long prompts in a row, and draw when pool ranks were leased and given back.

    python examples/serve_mixed.py --plot serve.png
    python examples/serve_mixed.py --lengths 64,5000 --model MODEL_FOLDER --prompt-file PROMPT.txt --activation cost

Each prompt is the beginning of one real text. A short one is computed as without the plugin; a long one borrows the
pool ranks for as long as it takes. The picture needs matplotlib.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.generation import BaseStreamer
from transformers.utils import logging

from fapool_plugin import FAPoolForCausalLM
from fapool_plugin.integrations.huggingface.runs import demo_model, demo_prompt
from fapool_plugin.tools.demo import Screen
from fapool_plugin.tools.options import check_counts, check_picture, one_line_errors

STATES = ("idle", "activating", "active", "draining")


@dataclass
class Request(BaseStreamer):
    """One prompt and what became of it. As a streamer it is handed the prompt first, then token after token."""

    pool: Any
    tokens: int
    began: datetime
    first: datetime | None = None
    ended: datetime | None = None
    pooled: bool = False
    lease: str = ""
    """State of the lease when the first new token came, and after the request."""
    _prompt_seen: bool = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen and self.first is None:
            self.first, self.lease = datetime.now(UTC), self.pool.stats()["state"]
        self._prompt_seen = True

    def end(self) -> None:
        pass


def serve(model: Any, prompt_1S: Tensor, new_tokens: int) -> Request:
    """Generates greedily from one prompt."""
    pool = model.fa_pool
    before = pool.stats()
    request = Request(pool, prompt_1S.shape[1], datetime.now(UTC))
    model.generate(
        prompt_1S,
        attention_mask=prompt_1S.new_ones(prompt_1S.shape),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=request,
    )
    request.ended, after = datetime.now(UTC), pool.stats()
    request.pooled = after["prefill"]["pooled_calls"] > before["prefill"]["pooled_calls"]
    request.lease += f", then {after['state']}"
    return request


def row(request: Request) -> str:
    """One line of the table."""
    assert request.first is not None
    ttft_s = (request.first - request.began).total_seconds()
    return f"{request.tokens:>7}  {ttft_s:>8.2f}  {'pooled' if request.pooled else 'local':<7}  {request.lease}"


def draw(path: Path, requests: list[Request], events: list[dict[str, str]]) -> None:
    """Draws each request from its beginning to its end, and the state of the lease below."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    start = requests[0].began
    colors = {"pooled": "C0", "local": "C1"}

    def since(moment: datetime) -> float:
        return (moment - start).total_seconds()

    figure = Figure(figsize=(9, 5), layout="constrained")
    spans, lease = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for index, request in enumerate(requests):
        assert request.first is not None
        assert request.ended is not None
        color = colors["pooled" if request.pooled else "local"]
        prefill, decode = since(request.first) - since(request.began), since(request.ended) - since(request.first)
        spans.barh(index, prefill, left=since(request.began), color=color)
        spans.barh(index, decode, left=since(request.first), color=color, alpha=0.4)
    spans.set_yticks(range(len(requests)), [f"{request.tokens} tokens" for request in requests])
    spans.invert_yaxis()
    spans.set_title("Requests (pale: decode), and the lease of the pool ranks")
    spans.legend(handles=[Patch(color=color, label=name) for name, color in colors.items()], loc="upper right")
    moments, states = [0.0], ["idle"]
    for event in events:
        if event["kind"] in STATES:
            moments.append(since(datetime.fromisoformat(event["time"])))
            states.append(event["kind"])
    lease.step(moments, [STATES.index(state) for state in states], where="post", color="black")
    lease.set_yticks(range(len(STATES)), STATES)
    lease.set(xlabel="seconds", ylabel="lease")
    lease.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def prompts(model: Path, text: str, lengths: list[int], new_tokens: int) -> list[Tensor]:
    """The first so many tokens of a text, for each length. Raises ValueError if it, or the model, has not as many."""
    ids_1S = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt", verbose=False).input_ids
    positions = AutoConfig.from_pretrained(model).max_position_embeddings
    for length in lengths:
        if length > ids_1S.shape[1]:
            raise ValueError(f"--lengths asks for {length} tokens; the text has {ids_1S.shape[1]}: give fewer")
        if length + new_tokens > positions:
            raise ValueError(
                f"--lengths {length} and {new_tokens} new tokens are {length + new_tokens}, the model has {positions} "
                f"positions: give lengths of at most {positions - new_tokens}"
            )
    return [ids_1S[:, :length] for length in lengths]


def main(
    lengths: Annotated[str, typer.Option(help="Tokens of each prompt, in the order of serving.")] = "64,6000,128,7000",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 8,
    model: Annotated[Path | None, typer.Option(help="Model folder; default: the demo model.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text (UTF-8) of the prompts; default: a real one.")] = None,
    pool_ranks: Annotated[int, typer.Option(help="Local pool ranks to borrow.")] = 1,
    threshold: Annotated[int, typer.Option(help="Longer sequences are pooled.")] = 4096,
    activation: Annotated[
        str, typer.Option(help="length: pool always; cost: where it is predicted to pay.")
    ] = "length",
    plot: Annotated[Path | None, typer.Option(help="Draw requests and lease into this picture.")] = None,
) -> None:
    """Serve prompts of mixed lengths one after the other, and say for each what was pooled."""
    with one_line_errors():
        if not all(length.strip().isdecimal() for length in lengths.split(",")):
            raise ValueError(f"--lengths {lengths} are no whole numbers; give such as 64,6000,128")
        sizes = [int(length) for length in lengths.split(",")]
        check_counts({"--new-tokens": new_tokens, "--lengths": min(sizes)})
        check_picture(plot)
        text = demo_prompt() if prompt_file is None else prompt_file.read_text(encoding="utf-8")
        served: list[Request] = []
        with Screen() as screen:
            folder = demo_model(progress=screen) if model is None else model
            waiting = prompts(folder, text, sizes, new_tokens)
            screen("loading the model", 0, None)
            fa_pool = {"pool_ranks": pool_ranks, "threshold": threshold, "activation": activation}
            loaded = FAPoolForCausalLM.from_pretrained(folder, fa_pool=fa_pool)
            with loaded.fa_pool as pool:
                print(f"{'tokens':>7}  {'ttft s':>8}  {'prefill':<7}  lease at the first token and after")
                for number, prompt_1S in enumerate(waiting, start=1):
                    screen(f"request {number} of {len(waiting)}: {prompt_1S.shape[1]} tokens", 0, None)
                    served.append(serve(loaded, prompt_1S, new_tokens))
                    print(row(served[-1]), flush=True)
                stats = pool.stats()
        print(f"{stats['activations']} activations, {stats['releases']} releases, {stats['faults']} faults")
        for reason, times in stats["local_reasons"].items():
            print(f"local {times} times: {reason}")
        for event in stats["events"]:
            print(f"{event['time']}  {event['kind']}: {event['reason']}")
        if plot is not None:
            draw(plot, served, stats["events"])


if __name__ == "__main__":
    logging.disable_progress_bar()  # it would write through ours
    typer.run(main)
