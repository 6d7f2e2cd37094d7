"""What our model and tokenizer of a run say, for tools that cannot import them: JSON in, JSON out.

    echo '{"texts": ["Once upon"]}' | python -m bench.compatibility.ours RUN

Of `texts`: `ids`, as documents begin; `conversations` (lists of messages): `rendered` and `prompts`, ids, and `learn`;
`tokens` (lists of ids, equally long): `logits`; `continue` (texts, or ids): `continued`, the ids of a greedy
continuation, at most `count`; `pairs` (a message, an answer that is preferred and one that is not), `beta` and a run
`reference`: `dpo`, the mean loss. And whether it is a `chat` model.
"""

import json
import sys
from pathlib import Path

import torch

from engine.chat_template import Message, answer_prompt, render, text_ends
from engine.config import AlignmentConfig
from engine.generate import document_prompt, generate
from engine.run import Run
from engine.runtime import Runtime
from engine.sampling import Sampling
from rlhf.methods import DPO
from rlhf.preferences import PairBatch, Pairs, Preference
from train.data.loader import pack


@torch.no_grad()
def main() -> None:
    asked = json.load(sys.stdin)
    run = Run(Path(sys.argv[1]))
    model, tokenizer = run.load_model(Runtime(torch.device("cpu"), "fp32"))
    conversations = [[Message(**message) for message in messages] for messages in asked.get("conversations", ())]
    rendered = [render(tokenizer, messages) for messages in conversations]
    starts = [document_prompt(tokenizer, each) if isinstance(each, str) else each for each in asked.get("continue", ())]
    chat = run.read_recipe().chat
    options = {"max_tokens": asked.get("count", 16), "stop_ids": text_ends(tokenizer, chat=chat)}
    continued = generate(model, tokenizer, starts, Sampling(temperature=0), **options)
    losses = []
    if "pairs" in asked:
        reference, _ = Run(Path(asked["reference"])).load_model(Runtime(torch.device("cpu"), "fp32"))
        pairs = Pairs(tokenizer, model.config.context)
        for message, chosen, rejected in asked["pairs"]:
            pairs.add(Preference((Message(**message),), chosen, rejected))
        batch = PairBatch.of(pack([*map(pairs.whole, range(len(pairs)))], int(pairs.lengths.sum())))
        losses.append(
            float(DPO(AlignmentConfig(method="dpo", beta=asked["beta"]), reference, tokenizer).loss(model, batch))
        )
    answer = {
        "chat": chat,
        "ids": [document_prompt(tokenizer, text) for text in asked.get("texts", ())],
        "rendered": [ids for ids, _ in rendered],
        "learn": [learn for _, learn in rendered],
        "prompts": [answer_prompt(tokenizer, messages) for messages in conversations],
        "logits": model.logits(model(torch.tensor(asked["tokens"]))).tolist() if "tokens" in asked else [],
        "dpo": sum(losses) / max(len(asked.get("pairs", ())), 1),
        "continued": [each.ids for each in continued],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
