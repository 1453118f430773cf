"""One run is there for all tests that only look at what a run leaves; and all runs of one model and
the same settings share what is traced and compiled for them."""

import copy
import functools
from pathlib import Path
from typing import NamedTuple

import pytest

import fjax
from experiments.common import build
from experiments.lexical_constraint.__main__ import main
from fjax import rollouts
from tests import pictures

from .commands import SMALL, finish


@pytest.fixture(scope="package", autouse=True)
def small_pictures(request):
    """What is on them is looked at in tests/runs; and a second Python, which runs each command once,
    draws them all."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pictures.small(monkeypatch, empty=not request.config.getoption("--one-case"))
        yield


@pytest.fixture(scope="package", autouse=True)
def shared_programs():
    """A model that was loaded before, of files that are the same still, has the same functions; of
    the same functions the sampler is the same, and of the same settings the tuner."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        load = _remembering(fjax.from_pretrained, _model_key)
        monkeypatch.setattr(
            fjax, "from_pretrained", lambda *args, **options: _apart(load(*args, **options))
        )
        monkeypatch.setattr(build, "make_tuner", _remembering(build.make_tuner, _tuner_key))
        of_stage = _remembering(_cached(build.stage_tuner), _tuner_key)
        monkeypatch.setattr(build, "stage_tuner", of_stage)
        make_log_prob_fn = functools.cache(fjax.make_log_prob_fn)
        monkeypatch.setattr(fjax, "make_log_prob_fn", make_log_prob_fn)
        monkeypatch.setattr(rollouts, "make_log_prob_fn", make_log_prob_fn)
        monkeypatch.setattr(rollouts, "make_sample_fn", functools.cache(rollouts.make_sample_fn))
        yield


def _remembering(make, key_of):
    """The same function; what it made before for an equal key, it does not make again."""
    made = {}

    @functools.wraps(make)
    def remembered(*args, **options):
        key = key_of(*args, **options)
        if key is None:
            return make(*args, **options)
        if key not in made:
            made[key] = make(*args, **options)
        return made[key]

    return remembered


def _apart(model):
    """With a tokenizer of its own, to which a test may give another template."""
    return model._replace(tokenizer=copy.deepcopy(model.tokenizer))


def _cached(make):
    """A function that makes a function, which is then asked once for each argument."""
    return lambda *args: functools.cache(make(*args))


def _model_key(name, **options):
    files = sorted(path for path in Path(name).glob("*") if path.is_file())
    stats = [path.stat() for path in files]
    about = tuple(
        (path.name, s.st_mtime_ns, s.st_size) for path, s in zip(files, stats, strict=True)
    )
    return (str(name), about, tuple(options.items())) if files else None


def _tuner_key(settings, model, contexts=None, trained=None):
    """What `make_tuner` reads; None where it is of more than this."""
    if settings.lora_rank is not None or settings.trainable is not None or settings.decay:
        return None
    of_loss = settings.algorithm, settings.divergence, settings.clip, settings.microbatch_size
    rate = settings.optimizer, settings.learning_rate, settings.warmup_steps, settings.max_grad_norm
    if contexts is None:
        prompts = (len(model.start_ids),)
    else:
        prompts = contexts.start, contexts.global_z, len(contexts.training.texts)
    return model.logits_fn, of_loss, rate, prompts


class Finished(NamedTuple):
    """A run that has come to its end: to be read, or to be copied."""

    folder: Path
    printed: str
    arguments: tuple


@pytest.fixture(scope="package")
def lexical_run(tmp_path_factory):
    """Four steps towards w9, which about a third of the tiny model's samples have."""
    folder = tmp_path_factory.mktemp("lexical") / "run"
    arguments = ("--word", "w9", *SMALL, "--checkpoint-every", 1)
    printed = finish(main, *arguments, "--steps", 4, "--run-folder", folder)
    return Finished(folder, printed, arguments)
