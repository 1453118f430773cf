"""How far fjax and transformers' torch models are apart, family by family, or on one folder.

python -m tests.parity_table                         tiny models with random weights, every check
python -m tests.parity_table --folder FOLDER         perplexity and greedy decoding of that model
"""

import argparse
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fjax import from_pretrained, make_log_prob_fn
from fjax.models import LanguageModel
from tests.models import parity

TEXT = """\
The harbour of the town had been built twice. The first time it was made of wood, and the people who
lived there said that it would last for as long as anybody needed it. It lasted for eleven years. One
night in November the wind turned to the north-east, and by the morning there were only a few posts
standing in the water, like the teeth of an old comb. Nobody was hurt, because the boats had been
pulled up on the beach two days before; an old woman called Marta had told everyone that her knee
hurt in the way it did before a storm, and although people laughed at her they had learned to listen.

The second harbour was made of stone. It took six summers, since the blocks had to come by barge from
a quarry forty miles to the south, and each of them weighed more than three horses. The engineer was a
young man who had never built anything larger than a bridge over a stream. He wrote down every number
twice, once in a red book and once in a blue one, and in the evening he compared the two. When they
differed, which happened more often than he liked, he went back to the shore with a lantern and
measured again. The workmen thought that this was funny. But the wall that he drew is still there, and
the line where it meets the sea is as straight as a ruler.

Today children fish from the end of it. There is a lamp that turns itself on at dusk, and a board
which tells you how high the tide will be. If you walk out on a calm day, you can see the old posts
under the surface, green and soft, with small crabs going in and out between them. Marta's house is a
museum now. It has one room, with a chair, a stove, and a red book lying open under glass.
"""
QUESTION = "Write a short story about a dog who finds an old boat. Use simple words."


def print_table() -> bool:
    """Whether all differences are within their bounds."""
    checks = list(parity.BOUNDS)
    width = max(map(len, parity.CASES)) + 2
    print(" " * width + "".join(f"{check:>22}" for check in checks))
    fine = True
    for name in parity.CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = parity.compare_all(name, Path(folder))
        print(f"{name:{width}}" + "".join(f"{found[check]:>22.1e}" for check in checks), flush=True)
        fine &= all(found[check] <= parity.BOUNDS[check] for check in checks)
    print(f"{'at most':{width}}" + "".join(f"{x:>22.1e}" for x in parity.BOUNDS.values()))
    return fine


def print_folder(folder: Path, new_tokens: int = 40) -> bool:
    """Whether perplexity is the same to 1e-4 and a greedy answer to the last token."""
    import torch
    from transformers import AutoModelForCausalLM

    ours = from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = ours.tokenizer(TEXT).input_ids[: ours.max_length]
    nats = _nats(ours, ids), _torch_nats(theirs, ids)
    ppl, torch_ppl = (math.exp(x / (len(ids) - 1)) for x in nats)
    gap = abs(ppl - torch_ppl) / torch_ppl
    print(f"{len(ids)} tokens: perplexity {ppl:.6f} by fjax, {torch_ppl:.6f} by transformers")
    print(f"relative difference {gap:.1e}, at most 1.0e-04")
    prompt = _prompt(ours.tokenizer)
    found = parity.continue_greedily(ours, prompt, np.ones(prompt.shape, bool), new_tokens)[0]
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    mask = torch.ones(prompt.shape, dtype=torch.long)
    answer = theirs.generate(torch.tensor(prompt), attention_mask=mask, **options)
    expected = answer[0, prompt.shape[1] :].numpy()
    same = int((found[: len(expected)] == expected).sum())
    print(
        f"greedy: {same} of {len(expected)} tokens are the same: {ours.tokenizer.decode(found)!r}"
    )
    return gap <= 1e-4 and same == len(expected)


def _prompt(tokenizer) -> np.ndarray:
    if tokenizer.chat_template is None:
        return np.array([tokenizer(QUESTION).input_ids])
    message = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return np.array([tokenizer(text, add_special_tokens=False).input_ids])


def _nats(model: LanguageModel, ids: list[int]) -> float:
    tokens = jnp.array([ids], jnp.int32)
    where = jnp.ones_like(tokens, bool).at[:, 0].set(False)
    return -float(jax.jit(make_log_prob_fn(model.logits_fn))(model.params, tokens, where)[0])


def _torch_nats(model, ids: list[int]) -> float:
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(tokens).logits[0, :-1].double(), -1)
    return -float(log_probs.gather(-1, tokens[0, 1:, None]).sum())


def main() -> None:
    """Exits with 1 if a difference is larger than it may be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of a real model")
    folder = parser.parse_args().folder
    raise SystemExit(0 if (print_table() if folder is None else print_folder(folder)) else 1)


if __name__ == "__main__":
    main()
