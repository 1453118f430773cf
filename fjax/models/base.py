"""A language model as a value: parameters, the pure functions of them, and what ends a sequence.

The rest of fjax is given these and never asks which model they are of. A `Family` is what turns a
Hugging Face folder into one: a value too, a handful of functions, so that a new one is one file and
one line in `fjax.models.families`, or is passed by whoever has it:

    from_pretrained(folder, families=(mine, *FAMILIES))
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fjax.sharding import Rules
from fjax.types import Array, Bool, DecodeFn, Float, Int, LogitsFn, Params, PyTree, ScoreFn

__all__ = [
    "TEXT_FORMATS",
    "Family",
    "KVCache",
    "LanguageModel",
    "ModelConfig",
    "PretrainedModel",
    "RewardModel",
    "check_flags",
    "check_numbers",
    "check_sizes",
    "family_of",
]

TEXT_FORMATS = ("text", "end text", "text end", "end text end")
"""What a reward model may have been trained on: texts alone, or with the end-of-sequence token
before, behind, or both."""


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far. Every leaf but ``length`` has the batch on axis 0.

    Attributes:
        keys: one ``[B, H, S, K]`` array a layer; S is the capacity, prompt and new tokens together.
        values: the same for the values.
        where: ``[B, S]``, True where a column holds a real token (False: left padding, or not yet
            filled).
        length: columns filled so far, the same for every row.
    """

    keys: tuple[Float[Array, "B H S K"], ...]
    values: tuple[Float[Array, "B H S K"], ...]
    where: Bool[Array, "B S"]
    length: Int[Array, ""]


class LanguageModel(NamedTuple):
    """A model, ready to be sampled from and aligned.

    `fjax.from_pretrained` makes one from a folder. A model of your own is this value with your own
    functions; ``config`` and ``tokenizer`` may be None where nothing asks for them:

    >>> from fjax.models import LanguageModel
    >>> def logits_fn(params, tokens, where=None, *, start=0):  # a bigram model
    ...     return params[tokens[:, start:]]
    >>> def decode_fn(params, tokens, cache, where=None):
    ...     return params[tokens[:, -1]], cache
    >>> import jax.numpy as jnp
    >>> bigram = LanguageModel(
    ...     config=None, params=jnp.zeros((5, 5)), tokenizer=None, logits_fn=logits_fn,
    ...     decode_fn=decode_fn, init_cache=lambda rows, columns: (), bos_id=0, eos_ids=(0,),
    ... )
    >>> bigram.eos_id
    0

    Attributes:
        config: its shape, as its family writes it.
        params: its parameters.
        tokenizer: of transformers.
        logits_fn: teacher-forced, see `fjax.make_log_prob_fn`.
        decode_fn: cached, see `fjax.sample`.
        init_cache: (rows, columns) -> empty cache for ``decode_fn``.
        max_length: tokens that it can read, prompt and continuation together; None for any number.
        bos_id: the token that stands before a text, and is the prompt where there is none: the
            tokenizer's beginning-of-sequence token, or its end-of-sequence token where it has none.
        eos_ids: the tokens that end a sequence, the tokenizer's first. See
            `fjax.from_pretrained` for which count.
        save: (folder, params, dtype=None), writes these parameters as a folder that transformers
            opens, with this configuration, tokenizer and ends; None for a model that has no such
            folder.
        shardings: (tree) -> shardings of the parameters, or of what an optimiser keeps of them;
            None on one device.
        prompt: tokens that every text continues where it has no prompt of its own, and that begin
            as the model's texts do; none for ``bos_id`` alone.
    """

    config: Any
    params: Params
    tokenizer: Any
    logits_fn: LogitsFn
    decode_fn: DecodeFn
    init_cache: Callable[[int, int], Any]
    max_length: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    save: Callable[..., None] | None = None
    shardings: Callable[[PyTree], PyTree] | None = None
    prompt: tuple[int, ...] = ()

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What stands before a text that has no prompt of its own: ``prompt``, or one token."""
        return self.prompt or (self.eos_id if self.bos_id is None else self.bos_id,)

    @property
    def eos_id(self) -> int:
        """The first of the tokens that end a sequence.

        GPT-2 has it before a text as well, and for padding.
        """
        return self.eos_ids[0] if self.eos_ids else self.tokenizer.eos_token_id


PretrainedModel = LanguageModel
"""The earlier name of `LanguageModel`."""


class RewardModel(NamedTuple):
    """A language model's body with a scalar head, which gives a text a number.

    Attributes:
        config: its shape, as its family writes it.
        params: ``{"transformer": as of the language model, "score": {"kernel": [D, 1]}}``.
        tokenizer: of transformers.
        score_fn: (params, tokens, where) -> scores.
        text_format: where the end-of-sequence token stands in what it scores, one of
            `TEXT_FORMATS`; another format gives other scores. None if its folder does not say.
    """

    config: Any
    params: Params
    tokenizer: Any
    score_fn: ScoreFn
    text_format: str | None = None


@runtime_checkable
class ModelConfig(Protocol):
    """What a family's configuration, a frozen dataclass, must have: its sizes by common names.

    ``heads``, of keys and values, which a mesh's tensor axis must divide, is looked at if it is
    there.
    """

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens that it can read; None for any number."""
        ...

    @property
    def width(self) -> int:
        """D of the hidden states, which a scalar head reads."""
        ...

    @property
    def depth(self) -> int:
        """Blocks, each with tensors of its own."""
        ...


def check_sizes(config: Any, *names: str) -> None:
    """ValueError if one of these fields, as read from a file, is not a valid size."""
    for name in names:
        size = getattr(config, name)
        # Beyond 2³¹ - 1 no 32-bit index reaches. True is a whole number to Python, but none that
        # anybody means.
        whole = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not whole or not 0 < size < 2**31:
            raise ValueError(f"{name} must be a whole number from 1 to {2**31 - 1}, got {size!r}.")


def check_numbers(config: Any, *names: str, below: float = math.inf) -> None:
    """ValueError if one of these fields is not a number from 0 to ``below``."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not number or not 0 <= value < below:
            raise ValueError(f"{name} must be a number from 0 to less than {below}, got {value!r}.")


def check_flags(config: Any, *names: str) -> None:
    """ValueError if one of these fields is neither True nor False."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(config, name)!r:.80}.")


class Family(NamedTuple):
    """One kind of model: its configuration, its tensors, its functions.

    Parameters are a tree of dicts whose leaves have the layout of the checkpoint's tensors; a
    product with a transposed kernel costs nothing more. So only names have to be translated. What
    causal decoders share, from padding to the cache, is in `fjax.models.causal`; a family is a file
    like `fjax.models.gpt2`.

    Attributes:
        name: in messages, as ``"GPT-2"``.
        model_types: what config.json may say under ``model_type``.
        config_type: the class of its configurations, a frozen dataclass with the sizes of
            `ModelConfig`; `fjax.save_pretrained` finds the family by it.
        read_config: what a config.json holds -> configuration. ValueError, without the folder's
            name, for what this family does not compute.
        write_config: configuration -> what config.json is to say, ``model_type`` and
            ``architectures`` among it. transformers fills in the rest where it knows the type.
        init_params: (config, rng_key, param_dtype=) -> parameters.
        tensor_name: path of a leaf in the tree -> its whole name in a checkpoint.
        logits_fn: (config, dtype=) -> teacher-forced function; with ``remat=True``, where it is
            asked for, one that computes its blocks again for the gradient.
        decode_fn: (config, dtype=) -> cached function.
        init_cache: (config, rows, columns, dtype=) -> empty cache for it.
        prefix: of names, which checkpoints of the body without a head leave out.
        tied: configuration -> tensors that a checkpoint may have twice, the second name to the
            first, both without prefix: a head that is the embedding again.
        buffers: pattern of names, without prefix, of tensors in a checkpoint that are no
            parameters, such as a causal mask.
        embedding: whole name of the tensor with one row a token, for whoever adds a token.
        head: key of the parameters, at the top of their tree, of a head that reward models have
            not; None if there is none beside the embedding.
        rules: how its parameters are sharded over a mesh, see `fjax.sharding.Rules`.
        score_fn: (config, dtype=) -> reward model; None if the family has none.
        score_architecture: transformers' name of the class with a scalar head.
    """

    name: str
    model_types: tuple[str, ...]
    config_type: type
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    init_params: Callable[..., Params]
    tensor_name: Callable[[tuple[str, ...]], str]
    logits_fn: Callable[..., LogitsFn]
    decode_fn: Callable[..., DecodeFn]
    init_cache: Callable[..., Any]
    prefix: str = ""
    tied: Callable[[Any], Mapping[str, str]] = lambda config: {}
    buffers: str = r"(?!)"
    embedding: str | None = None
    head: str | None = None
    rules: Rules = ()
    score_fn: Callable[..., ScoreFn] | None = None
    score_architecture: str | None = None


def family_of(config: Any, families: Sequence[Family]) -> Family:
    """The family of a model, by the class of its configuration.

    Families that share a class are told apart by the ``model_type`` that the configuration has.

    Raises:
        ValueError: if it is of none of them.
    """
    for family in families:
        kind = getattr(config, "model_type", family.model_types[0])
        if isinstance(config, family.config_type) and kind in family.model_types:
            return family
    known = ", ".join(dict.fromkeys(family.config_type.__name__ for family in families))
    raise ValueError(
        f"config is a {type(config).__name__}, and must be one of {known}, or of a family that is "
        f"passed as families=(mine, *fjax.models.FAMILIES)."
    )
