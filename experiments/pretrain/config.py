"""What can be set on the command line of the pre-training."""

from dataclasses import dataclass
from pathlib import Path

from ..common.arguments import check_numbers


@dataclass(frozen=True)
class Config:
    """Pre-train the built-in GPT-2 on sentences of the movie-review corpora, and write it as a
    Hugging Face folder."""

    corpora: Path = Path("corpora")
    """Folder with movie_reviews.zip, sentence_polarity.zip and subjectivity.zip (Pang & Lee, CC BY
    4.0)."""
    output: Path = Path("experiments/assets/reviews-gpt2")
    """The model is written here; an existing folder is replaced only when the training is
    complete."""
    run_folder: Path = Path("runs/pretrain")
    """Checkpoints and metrics. A run that was interrupted goes on from here by itself."""
    vocab_size: int = 2560
    """Entries of the byte-level BPE."""
    n_embd: int = 256
    """Width of the model."""
    n_layer: int = 4
    """Number of blocks."""
    n_head: int = 4
    """Attention heads; must divide the width."""
    n_positions: int = 128
    """Longest sequence, in tokens; a multiple of 8."""
    dropout: float = 0.0
    """Dropout while training. In three epochs it costs more time than it gains; use 0.1 from five
    epochs on."""
    epochs: int = 3
    """Passes over the training sentences."""
    batch_size: int = 96
    """Sentences a step."""
    learning_rate: float = 0.02
    """Peak rate of Muon, which trains the matrices of the blocks."""
    adam_learning_rate: float = 2e-3
    """Peak rate of AdamW, which trains everything else (embeddings, biases, norms)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    warmup_steps: int = 100
    """Steps of linear warm-up, before a cosine to zero."""
    checkpoint_every: int = 300
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""

    def __post_init__(self):
        check_numbers(self)
        if self.n_embd % self.n_head:
            raise ValueError(f"--n-head must divide --n-embd, got {self.n_head} and {self.n_embd}.")
        if self.vocab_size <= 256:
            raise ValueError(f"--vocab-size must be above the 256 bytes, got {self.vocab_size}.")
        if self.n_positions % 8:
            raise ValueError(
                f"--n-positions must be a multiple of 8, as the widths of batches are; got "
                f"{self.n_positions}."
            )
