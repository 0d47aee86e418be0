"""Generate from a long text with borrowed attention ranks, the shortest way.

    python examples/generate_hf.py MODEL_FOLDER PROMPT.txt configs/fa_pool.json

The third argument is what ``fa_pool=`` takes: a JSON file here, a dict or a FAPoolConfig elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer, TextStreamer

from fapool_plugin import FAPoolForCausalLM


def main(model_folder: str, prompt_file: str, config_file: str) -> None:
    """Streams the answer, then says what was pooled."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = tokenizer(Path(prompt_file).read_text(encoding="utf-8"), return_tensors="pt")
    model = FAPoolForCausalLM.from_pretrained(model_folder, fa_pool=config_file)
    with model.fa_pool as pool:
        model.generate(**prompt, max_new_tokens=32, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
        stats = pool.stats()
    for phase in ("prefill", "decode"):
        print(f"{phase}: {stats[phase]['pooled_calls']} pooled calls, {stats[phase]['local_calls']} local ones")
    for event in stats["events"]:
        print(f"{event['time']}  {event['kind']}: {event['reason']}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
