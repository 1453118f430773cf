"""The shipped folder: the model in half precision, its tokenizer, and a model card with figures of
that very file."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from fjax import _markdown
from fjax.models import LanguageModel, gpt2, huggingface
from fjax.models.huggingface.tokenizers import import_transformers
from fjax.runs.display import hardware
from fjax.sampling import Samples, sample

from ..common import corpora as data
from . import train
from .config import Config

NEW_TOKENS = 64
"""Of a sample of the card, at most; fewer where the model has no room for them."""


def write(
    config: Config,
    model: gpt2.GPT2Config,
    params: gpt2.Params,
    tokenizer: Tokenizer,
    split: data.Split,
    five_gram_nats: float,
    seconds: float,
) -> None:
    """Saves the model to ``config.output``, reads it back, and describes what was read back."""
    wrapped = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=data.END, eos_token=data.END, unk_token=data.END
    )
    huggingface.save_pretrained(config.output, params, model, wrapped, dtype=jnp.float16)
    shipped = huggingface.from_pretrained(config.output)
    held_out = data.encode(tokenizer, split.held_out)
    samples = _draw(shipped, rows=512, seed=config.seed)
    texts = wrapped.batch_decode(
        [
            row[keep]
            for row, keep in zip(np.asarray(samples.tokens), np.asarray(samples.where), strict=True)
        ],
        skip_special_tokens=True,
    )
    nats = nats_per_row(model, shipped.params, held_out)
    text = CARD.format(
        front_matter=_markdown.front_matter(FRONT_MATTER),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6,
        command=_command(config),
        minutes=seconds / 60,
        hardware=hardware(),
        train=len(split.train),
        held_out=len(split.held_out),
        gpt2=bits_per_byte(nats, split.held_out),
        five_gram=bits_per_byte(five_gram_nats, split.held_out),
        ended=float(np.mean(samples.finished)),
        new_tokens=_new_tokens(shipped),
        samples="\n".join(f"- {t}" for t in texts[:10]),
        **{
            name: getattr(model, name)
            for name in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
        },
    )
    (Path(config.output) / "README.md").write_text(text, encoding="utf-8")


def nats_per_row(model: gpt2.GPT2Config, params: gpt2.Params, rows: list[np.ndarray]) -> float:
    """Summed nats of ``rows`` under the GPT-2, divided by their number."""
    evaluate, total = train.make_evaluate(model), 0.0
    for first in range(0, len(rows), 128):
        total += float(
            evaluate(params, *data.pad(rows[first : first + 128], multiple=model.n_positions))
        )
    return total / len(rows)


def bits_per_byte(nats_per_sentence: float, sentences: list[str]) -> float:
    """Bits a byte of text, one byte counted for the end of each sentence."""
    return (
        nats_per_sentence / math.log(2) / float(np.mean([len(s.encode()) + 1 for s in sentences]))
    )


def _draw(shipped: LanguageModel, *, rows: int, seed: int) -> Samples:
    prompt = jnp.full((rows, 1), shipped.tokenizer.eos_token_id, jnp.int32)
    new_tokens = _new_tokens(shipped)
    cache = shipped.init_cache(rows, 1 + new_tokens)

    def draw(params, rng_key, prompt, cache):
        eos_id = shipped.tokenizer.eos_token_id
        return sample(
            shipped.decode_fn,
            params,
            rng_key,
            prompt,
            cache,
            max_new_tokens=new_tokens,
            eos_id=eos_id,
        )

    return jax.jit(draw)(shipped.params, jax.random.key(seed), prompt, cache)


def _new_tokens(shipped: LanguageModel) -> int:
    return min(NEW_TOKENS, shipped.config.n_positions - 1)


def _command(config: Config) -> str:
    changed = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(config).items()
        if value != getattr(Config, name) and name not in ("run_folder", "output", "corpora")
    ]
    return " ".join(["python -m experiments.pretrain --corpora corpora", *changed])


FRONT_MATTER = {
    "language": "en",
    "license": "cc-by-4.0",
    "library_name": "fjax",
    "pipeline_tag": "text-generation",
    "tags": ["gpt2", "jax", "fjax"],
}

CARD = """{front_matter}
# reviews-gpt2

The built-in model of fjax: a GPT-2 of {parameters:.1f}M parameters ({n_layer} blocks, {n_head}
heads, width {n_embd}, {n_positions} positions, byte-level BPE of {vocab_size} entries) that writes
one sentence of a movie review and ends it. It exists so that every experiment runs without a
download; it knows nothing else and is no use outside that.

- **Data.** {train:,} distinct sentences of 3 to 30 words, lower-cased and tokenised as published,
  from *Sentiment Polarity Dataset 2.0* (Bo Pang and Lillian Lee, ACL 2004), *Sentence Polarity
  Dataset 1.0* (Pang and Lee, ACL 2005) and *Subjectivity Dataset 1.0* (Pang and Lee, ACL 2004), all
  CC BY 4.0; {held_out:,} further ones held out by a hash of their text. The reviews carry the
  opinions, names and slurs of their time; so may the samples.
- **Licence of the weights.** CC BY 4.0, with the attribution above.
- **Format.** `<|endoftext|>`, sentence, `<|endoftext|>`; weights in float16, trained in float32.
- **Command.** `{command}`: {minutes:.0f} minutes on {hardware}.

| held-out sentences, end of sentence included | bits per byte |
| --- | --- |
| this file | {gpt2:.3f} |
| interpolated 5-gram (modified Kneser–Ney), same tokens and split | {five_gram:.3f} |

{ended:.1%} of 512 samples end by themselves within {new_tokens} tokens. The first ten of them,
temperature 1, unedited:

{samples}
"""
