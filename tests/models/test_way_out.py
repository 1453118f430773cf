"""The way out: the folder that a run leaves opens in transformers and says there what it said
here."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fjax
from fjax import evaluation, rollouts, runs
from fjax.sampling import greedy, sample
from tests.make_fixtures import EOS, make_tokenizer
from tests.models.folders import TINY

ROOT = Path(__file__).parents[2]
WORD, TOKENS, TEMPLATE = 9, 8, "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A run of some steps towards texts with a word, from a base with two ends, padding of its own
    and a chat template."""
    base = tmp_path_factory.mktemp("base")
    tiny, tokenizer = fjax.from_pretrained(TINY), make_tokenizer()
    tokenizer.pad_token, tokenizer.chat_template = "w4", TEMPLATE
    fjax.save_pretrained(base, tiny.params, tiny.config, tokenizer, eos_ids=[EOS, 3])
    model = fjax.from_pretrained(base)

    def features(prompts, texts):
        said = [f"w{WORD}" in text.split() for text in texts]
        return {"satisfaction": np.array(said, np.float32)}

    def log_score(log_a, features):
        return np.where(features["satisfaction"] > 0, log_a, -np.inf)

    target = evaluation.TextTarget(features, log_score, headline="satisfaction")
    collector = rollouts.model_collector(model, max_new_tokens=TOKENS, samples=128, base_samples=32)
    divergences = {"forward_kl": fjax.forward_kl()}
    tuner = fjax.fdpg(
        fjax.make_log_prob_fn(model.logits_fn, start=1),
        optax.adam(3e-2),
        divergence=divergences["forward_kl"],
    )
    folder = tmp_path_factory.mktemp("runs") / "w9"
    sizes = {"steps": 20, "eval_every": 20, "eval_samples": 1024}
    result = runs.align(model, target, tuner, collector, folder=folder, divergences=divergences, **sizes)  # fmt: skip
    (before, *_) = runs.folder.read_evaluations(folder)
    return SimpleNamespace(model=model, folder=folder / "model", result=result, before=before)


@pytest.fixture(scope="module")
def theirs(aligned):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(aligned.folder).eval()


def test_it_draws_what_was_measured_here(aligned, theirs):
    """Without an option: within four standard errors of the difference, which the base is not."""
    import torch

    torch.manual_seed(0)
    start = torch.full((4096, 1), aligned.model.bos_id)
    with torch.no_grad():
        rows = theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=TOKENS)
    said = (rows[:, 1:] == WORD).any(1).numpy()
    found, error = said.mean(), said.std() / np.sqrt(len(said))
    measured = aligned.result.figures["satisfaction"]
    assert abs(found - measured.value) < 4 * np.hypot(error, measured.std_error)
    before, its = (aligned.before[f"satisfaction{name}"] for name in ("", "_std_error"))
    assert found - before > 10 * np.hypot(error, its)


def test_its_likeliest_text_is_the_same_token_for_token(aligned, theirs):
    import torch

    prompt = np.arange(10, 40).reshape(10, 3).astype(np.int32)
    expected = theirs.generate(
        torch.tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=TOKENS,
        do_sample=False,
    ).numpy()[:, 3:]
    model = aligned.model
    drawn = jax.jit(
        lambda params, cache: sample(
            model.decode_fn, params, jax.random.key(0), jnp.asarray(prompt), cache,
            max_new_tokens=TOKENS, eos_id=model.eos_ids, transform=greedy,
        )
    )(aligned.result.params, model.init_cache(10, 3 + TOKENS))  # fmt: skip
    found, where = np.asarray(drawn.tokens), np.asarray(drawn.where)
    width = expected.shape[1]
    np.testing.assert_array_equal(found[:, :width][where[:, :width]], expected[where[:, :width]])
    assert not where[:, width:].any()


def test_ends_padding_and_chat_template_travel_along(aligned):
    transformers = pytest.importorskip("transformers")
    said = transformers.GenerationConfig.from_pretrained(aligned.folder)
    assert (said.bos_token_id, said.eos_token_id, said.pad_token_id) == (EOS, [EOS, 3], 4)
    assert (said.do_sample, said.temperature, said.top_k, said.top_p) == (True, 1.0, 0, 1.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(aligned.folder)
    assert tokenizer.chat_template == TEMPLATE


def test_its_card_has_what_the_run_measured(aligned):
    text = (aligned.folder / "README.md").read_text()
    measured = aligned.result.figures["satisfaction"]
    assert f"| satisfaction | {aligned.before['satisfaction']:.3f} ± " in text
    assert f" | {measured.value:.3f} ± {measured.std_error:.3f} |" in text


def test_the_code_of_the_card_and_of_the_page_runs(aligned, theirs, monkeypatch, capsys):
    monkeypatch.chdir(aligned.folder)
    page = ROOT / "docs/how-to/serve.md"
    for path in (aligned.folder / "README.md", page):
        (code,) = path.read_text().split("```python\n")[1:]
        code, names = code.split("```")[0], {"MODEL": str(aligned.folder)}
        exec(compile(code.replace("=40", f"={TOKENS}"), str(path), "exec"), names)
        assert names["rows"].shape[1] > 1
    assert re.search(r"w\d+", capsys.readouterr().out)
