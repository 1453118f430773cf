"""Makes tests/fixtures: a tiny random GPT-2 as transformers writes it, and what torch computes with
it.

With torch installed, ``python tests/make_fixtures.py`` writes them anew. They let every machine
check parity without torch; where torch is present, tests/models/test_parity.py compares with it
directly as well.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures"
SHAPE = {"vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
EOS = 60


def make_tokenizer():
    """Words w0 … w59 and an end token, so that ids and texts are easily told from each other."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(EOS)} | {"<|endoftext|>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    )


def torch_gpt2(shape: dict, *, eos_id: int, seed: int = 0, scale: float = 1.0):
    """transformers' GPT-2 with random weights, all of them: biases and norms too, or errors in them
    would not show."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(**shape, bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale).add_(0.05 * scale * torch.randn_like(parameter))
    return model


def torch_answers(model, tokens: np.ndarray, counted: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, log-probabilities of the counted tokens, and the gradient of their sum in three
    tensors."""
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids).logits
    log_probs = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    sequence = (log_probs * torch.tensor(counted[:, 1:])).sum(-1)
    model.zero_grad()
    sequence.sum().backward()
    named = dict(model.named_parameters())
    chosen = (
        "transformer.wte.weight",
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.0.ln_1.bias",
    )
    return {
        "logits": logits.detach().numpy(),
        "sequence_log_probs": sequence.detach().numpy(),
        **{
            f"gradient {name.removeprefix('transformer.')}": named[name].grad.numpy()
            for name in chosen
        },
    }


def batch(
    shape: dict, *, rows: int = 3, columns: int = 12, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, and a mask of completions of different lengths behind prompts of two
    tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, shape["vocab_size"], (rows, columns))
    ends = rng.integers(3, columns + 1, (rows, 1))
    column = np.arange(columns)[None]
    return tokens, (column >= 2) & (column < ends)


def main() -> None:
    """Writes the folder of the model and the answers beside it."""
    import torch

    model = torch_gpt2(SHAPE, eos_id=EOS, scale=4.0)
    model.save_pretrained(FOLDER / "tiny-gpt2")
    make_tokenizer().save_pretrained(FOLDER / "tiny-gpt2")
    tokens, counted = batch(SHAPE)
    prompt = torch.tensor(tokens[:, :4])
    greedy = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=EOS,
    )
    np.savez_compressed(
        FOLDER / "tiny-gpt2-torch.npz",
        tokens=tokens,
        counted=counted,
        greedy=greedy[:, 4:].numpy(),
        **torch_answers(model, tokens, counted),
    )


if __name__ == "__main__":
    main()
