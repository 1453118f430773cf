"""A mesh of devices changes where things lie and nothing else: eight virtual devices against one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import fjax
from fjax import rollouts, sharding
from fjax._trees import name_leaves
from fjax.log_probs import make_log_prob_fn
from fjax.models import LanguageModel, gpt2, llama
from fjax.models.sharded import on_mesh, shard_model
from fjax.runs.memory import bytes_per_device
from fjax.runs.programs import collective_bytes, compile_to_inspect, program_memory

CONFIG = gpt2.GPT2Config(vocab_size=24, n_positions=12, n_embd=16, n_layer=2, n_head=4)
LAYOUTS = ("data=8", "fsdp=8", "data=4,tensor=2", "data=2,fsdp=2,tensor=2")
STEPS = 10


def make_model(dtype) -> LanguageModel:
    params = gpt2.init_params(CONFIG, jax.random.key(0), param_dtype=dtype)
    return LanguageModel(
        CONFIG,
        jax.tree.map(lambda x: 8 * x, params),  # else all tokens are equally likely
        None,
        gpt2.logits_fn(CONFIG, dtype=dtype),
        gpt2.decode_fn(CONFIG, dtype=dtype),
        partial(gpt2.init_cache, CONFIG, dtype=dtype),
        max_length=CONFIG.max_length,
        bos_id=0,
        eos_ids=(0,),
    )


def align(model, optimizer, microbatch_size):
    """Ten steps: tokens, losses and gradient norms of each, and the last state."""
    log_prob_fn = make_log_prob_fn(model.logits_fn)
    sample_fn = rollouts.make_sample_fn(
        model.decode_fn, model.init_cache, max_new_tokens=6, eos_id=0
    )
    draw = rollouts.make_draw(
        sample_fn, jax.jit(log_prob_fn), model.params, start_id=0, samples=32, base_samples=8
    )
    tuner = fjax.fdpg(
        log_prob_fn,
        optimizer,
        divergence=fjax.jensen_shannon(),
        microbatch_size=microbatch_size,
    )
    state, seen = tuner.init(model.params), []
    update = sharding.jit_update(tuner.update)
    for step in range(STEPS):
        batch = draw(state.params, jax.random.fold_in(jax.random.key(1), step))
        tokens = np.asarray(batch.tokens)
        log_score = np.where((tokens == 5).any(1), np.asarray(batch.log_a), -np.inf)
        rollout = rollouts.to_rollout(batch, log_score)
        state, info = update(state, rollout)
        seen.append((tokens, np.asarray(info.loss), np.asarray(info.grad_norm)))
    return seen, state


CASES = {
    # Adam moves a weight whose gradient is all rounding as far as any other: in float64 alone can
    # its ten steps be compared.
    "float32": (jnp.float32, optax.sgd(0.3), 1e-5),
    "float64": (jnp.float64, optax.adam(1e-2), 1e-9),
}


@pytest.fixture(scope="module")
def on_one_device():
    """Name of a case -> what one device does."""
    found = {}
    for name, (dtype, optimizer, _) in CASES.items():
        with jax.enable_x64(name == "float64"):
            found[name] = align(make_model(dtype), optimizer, None)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_layout_takes_the_steps_of_one_device(layout, case, on_one_device):
    dtype, optimizer, tolerance = CASES[case]
    expected, last = on_one_device[case]
    with jax.enable_x64(case == "float64"):
        mesh = sharding.make_mesh(layout)
        model = shard_model(make_model(dtype), mesh, rules=gpt2.RULES, gathers=True)
        seen, state = align(model, optimizer, 16 if case == "float64" else None)
    for (tokens, *numbers), (tokens_there, *numbers_there) in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(tokens, tokens_there)
        np.testing.assert_allclose(numbers, numbers_there, rtol=0, atol=tolerance)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, last)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    shardings = sharding.make_shardings(model.params, gpt2.RULES, mesh)
    for path, leaf in name_leaves(state.params).items():
        there = name_leaves(shardings)[path]
        assert leaf.sharding.is_equivalent_to(there, leaf.ndim), path


def test_a_llama_is_the_same_in_shards(x64):
    """Blocks as a scan over fsdp, shared heads over tensor: log π, its gradient, and a cache."""
    config = llama.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        qkv_bias=True,
        qk_norm=True,
    )
    params = jax.tree.map(lambda x: 8 * x, llama.init_params(config, jax.random.key(0)))
    functions = [f(config, dtype=jnp.float64) for f in (llama.logits_fn, llama.decode_fn)]
    cache_fn = partial(llama.init_cache, config, dtype=jnp.float64)
    alone = LanguageModel(config, params, None, *functions, cache_fn)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = shard_model(alone, mesh, rules=llama.RULES, gathers=True)
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 24)
    where = jnp.arange(6)[None] >= jnp.array([[1], [2], [3], [4]])

    def numbers(model):
        total = lambda params: make_log_prob_fn(model.logits_fn)(params, tokens, where).sum()  # noqa: E731
        return jax.value_and_grad(total)(model.params), model.decode_fn(
            model.params, tokens, model.init_cache(4, 8), where
        )

    expected, found = (jax.jit(lambda m=m: numbers(m))() for m in (alone, model))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-9), found, expected)
    queries = name_leaves(model.params)["layers_1/self_attn/q_proj/weight"]
    assert queries.addressable_shards[0].data.shape == (8, 8)
    with pytest.raises(ValueError, match="4 does not divide 2"):  # heads of keys, not of queries
        shard_model(alone, sharding.make_mesh("data=2,tensor=4"), rules=llama.RULES)


BLOCKS = gpt2.GPT2Config(vocab_size=32, n_positions=8, n_embd=64, n_layer=16, n_head=2)
"""Nearly all of its parameters are in blocks."""


def compiled_update(layout, rows=8, microbatch_size=None):
    """Of that model, by shapes alone."""
    params = jax.eval_shape(lambda: gpt2.init_params(BLOCKS, jax.random.key(0)))
    model = make_model(jnp.float32)._replace(logits_fn=gpt2.logits_fn(BLOCKS))
    model = on_mesh(model, sharding.make_mesh(layout), gpt2.RULES)
    log_prob_fn = make_log_prob_fn(model.logits_fn)
    options = {"divergence": fjax.jensen_shannon(), "microbatch_size": microbatch_size}
    tuner = fjax.fdpg(log_prob_fn, optax.sgd(0.1), **options)
    state = jax.eval_shape(tuner.init, params)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        model.shardings(state),
    )
    tokens = jax.ShapeDtypeStruct((rows, 4), jnp.int32)
    numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
    rollout = fjax.Rollout(tokens, jax.ShapeDtypeStruct((rows, 4), bool), numbers, numbers)
    return compile_to_inspect(sharding.jit_for(tuner.update, state).lower(state, rollout)), params


def test_an_update_moves_what_its_layout_must():
    """Beside rounding errors of kilobytes: statistics of eight samples."""
    compiled, params = compiled_update("data=8")
    whole = bytes_per_device(params)
    moved = collective_bytes(compiled)
    assert set(moved) <= {"all-reduce", "all-gather"}
    np.testing.assert_allclose(moved["all-reduce"], whole, rtol=0.1)  # the gradient
    assert moved.get("all-gather", 0) < 0.01 * whole

    compiled, _ = compiled_update("fsdp=8")
    moved = collective_bytes(compiled)
    # Parameters for the forward pass, those of blocks for the backward pass again; the gradient.
    np.testing.assert_allclose(moved["all-gather"], 2 * whole, rtol=0.1)
    reduced = moved["all-reduce"] + moved.get("reduce-scatter", 0)
    np.testing.assert_allclose(reduced, whole, rtol=0.1)
    # Two of sixteen blocks whole, and some eighths: the gradient, and what becomes of it.
    assert program_memory(compiled).temporary < 0.75 * whole


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("data=3", "takes 3 devices, and there are 8"),
        ("data=-1,tensor=3", "takes 6 devices, and there are 8"),
        ("data=16", "takes 16 devices"),
        ("model=8", "has the axes data, fsdp, tensor; got 'model'"),
        ("data=two", "axis=size"),
        ("data=2,data=4", "each axis once"),
        ("data=-1,fsdp=-1", "for one of them -1"),
        ("data=0", "1 or more"),
        ({"data": 2, "fsdp": 2}, "takes 4 devices"),
    ],
)
def test_a_mesh_that_there_cannot_be_is_refused(shape, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        sharding.make_mesh(shape)


def test_sizes_that_are_left_open_are_found():
    assert dict(sharding.make_mesh(" fsdp = 2 , data=-1").shape) == {
        "data": 4,
        "fsdp": 2,
        "tensor": 1,
    }
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_what_a_mesh_does_not_divide_is_named():
    mesh = sharding.make_mesh("tensor=8")
    with pytest.raises(ValueError, match="8 does not divide 4"):
        shard_model(make_model(jnp.float32), mesh, rules=gpt2.RULES)
    with pytest.raises(ValueError, match=r"samples \(12\) must be a multiple of 8"):
        sharding.check_rows(sharding.make_mesh("data=4,fsdp=2"), 12, "samples")
    odd = {"h_0": {"mlp": {"c_fc": {"kernel": np.zeros((12, 48))}}}}
    with pytest.raises(ValueError, match=r"h_0/mlp/c_fc/kernel of shape \[12, 48\] cannot be"):
        sharding.make_shardings(odd, gpt2.RULES, sharding.make_mesh("fsdp=8"))


def test_a_vocabulary_that_cannot_be_divided_is_sharded_by_its_width():
    mesh = sharding.make_mesh("tensor=2,fsdp=4")
    for tokens, expected in ((96, ("tensor", "fsdp")), (97, (None, ("tensor", "fsdp")))):
        tree = {"wte": {"embedding": np.zeros((tokens, 16))}}
        found = sharding.make_shardings(tree, gpt2.RULES, mesh)["wte"]["embedding"].spec
        assert tuple(found) == expected


def test_a_folder_is_read_straight_into_shards(tmp_path, monkeypatch):
    """No device, and no call for a part of a file, has a whole matrix."""
    whole = fjax.from_pretrained("built-in")
    parts = []
    place = jax.make_array_from_callback

    def seen(shape, sharding, part):
        return place(
            shape, sharding, lambda index: parts.append((shape, part(index))) or part(index)
        )

    monkeypatch.setattr(jax, "make_array_from_callback", seen)
    mesh = sharding.make_mesh("fsdp=8")
    model = fjax.from_pretrained("built-in", mesh=mesh)
    for (path, ours), theirs in zip(
        name_leaves(model.params).items(), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)
        if theirs.ndim == 2:
            assert {shard.data.size for shard in ours.addressable_shards} == {theirs.size // 8}
    assert all(part.size == np.prod(shape) // 8 for shape, part in parts if len(shape) == 2)


def test_micro_batches_leave_rows_where_they_are():
    """Each device has its own rows in every part; parts of rows that follow would be gathered."""
    compiled, params = compiled_update("data=8", rows=32, microbatch_size=8)
    assert collective_bytes(compiled).get("all-gather", 0) < 0.01 * bytes_per_device(params)


def test_blocks_that_are_computed_again_give_the_same_gradient_in_less_memory():
    params = gpt2.init_params(BLOCKS, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (64, 8), 0, 32)
    found = {}
    for remat in (False, True):
        score = make_log_prob_fn(gpt2.logits_fn(BLOCKS, remat=remat))
        total = lambda params, score=score: score(params, tokens, tokens >= 0).sum()  # noqa: E731
        gradient = jax.jit(jax.grad(total))
        memory = program_memory(compile_to_inspect(gradient.lower(params))).temporary
        found[remat] = gradient(params), memory
    for ours, theirs in zip(*(jax.tree.leaves(found[remat][0]) for remat in found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert found[True][1] < found[False][1] / 2


def test_a_model_of_ones_own_need_not_know_of_a_mesh():
    """A bigram: its functions are given whole arrays, however they are sharded."""
    table = jax.random.normal(jax.random.key(0), (24, 24))
    bigram = make_model(jnp.float32)._replace(
        params={"table": table},
        logits_fn=lambda params, tokens, where=None, *, start=0: params["table"][tokens[:, start:]],
        decode_fn=lambda params, tokens, cache, where=None: (params["table"][tokens[:, -1]], cache),
        init_cache=lambda rows, columns: (),
    )
    tokens = jnp.arange(16).reshape(8, 2)
    second = tokens % 2 == 1
    expected = make_log_prob_fn(bigram.logits_fn)(bigram.params, tokens, second)
    rules = [("table", (PartitionSpec("fsdp", "tensor"),))]
    model = shard_model(bigram, sharding.make_mesh("fsdp=4,tensor=2"), rules=rules)
    assert model.params["table"].addressable_shards[0].data.shape == (6, 12)
    found = jax.jit(make_log_prob_fn(model.logits_fn))(model.params, tokens, second)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
