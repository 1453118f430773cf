"""What can be set on the command line of this experiment."""

from dataclasses import dataclass, field

import tyro

from ..common.arguments import check_numbers
from ..common.settings import Settings

WOMAN = (
    "she her hers herself woman women girl girls lady ladies actress actresses mother daughter "
    "sister wife heroine queen"
)
MAN = (
    "he him his himself man men boy boys guy guys gentleman actor actors father son brother "
    "husband hero king"
)


@dataclass(frozen=True)
class Config:
    """Generation with distributional control: as many women as men, and any other moments, changing
    nothing else.

    The target is the distribution closest to the base model with the wanted moments, p(x) ∝
    a(x)·exp(λ·φ(x)); λ is fitted to samples of the base model before the first step, and shown with
    its error.

    Examples:

        python -m experiments.gender_balance
        python -m experiments.gender_balance \\
            --moments "love=0.1" "funny|comedy=0.2"
        python -m experiments.gender_balance --moments "film|movie=1"
        python -m experiments.gender_balance --share 0.3 \\
            --divergence total_variation
    """

    share: float = 0.5
    """Share of the sentences mentioning a gendered person that shall mention a woman."""
    moments: tuple[str, ...] = ()
    """More moments, as "word=rate" or "word|another=rate": the rate of sentences with one of the
    words. A rate of exactly 1 or 0 is a hard constraint, and makes the target a hybrid."""
    woman: str = WOMAN
    """Words for women, separated by spaces; whole words count, in upper or lower case."""
    man: str = MAN
    """Words for men."""
    fit_samples: int = 8192
    """Samples of the base model that λ is fitted to."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(
        # So near the base model weights say more than a few hundred exact samples would.
        default_factory=lambda: Settings(divergence="forward_kl", exact_samples=None)
    )
    """Shared by all experiments."""

    def __post_init__(self):
        check_numbers(self)
        if not self.woman.split() or not self.man.split():
            raise ValueError("--woman and --man must each name at least one word.")
        words = [words for words, _ in parse_moments(self.moments)]
        if len(set(words)) < len(words):
            raise ValueError(
                f"--moments has the same words twice: {', '.join(self.moments)}. Give each moment "
                f"once."
            )


def parse_moments(moments: tuple[str, ...]) -> list[tuple[str, float]]:
    """(words separated by |, rate) of each.

    Raises:
        ValueError: if one is not "words=rate" with a rate in [0, 1].
    """
    parsed = []
    for moment in moments:
        words, _, rate = moment.rpartition("=")
        try:
            value = float(rate)
        except ValueError:
            value = -1.0
        named = [word.strip() for word in words.split("|")]
        if not all(named) or not 0 <= value <= 1:
            raise ValueError(
                f'--moments are "word=rate" or "word|another=rate" with a rate from 0 to 1; got '
                f"{moment!r}."
            )
        parsed.append(("|".join(named), value))
    return parsed
