"""Every public function of the mathematics under jit, vmap, grad, pmap and shard_map, on eight
devices: the same numbers."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fjax import (
    divergences,
    enumeration,
    estimators,
    moments,
    policy_gradients,
    preferences,
    rejection,
    surrogates,
    targets,
)

DEVICES, N, T, K = 8, 6, 4, 2
# Where f is an argument any will do; each has a line of its own below. Jensen–Shannon takes ten times
# as long to compile.
F = divergences.squared_hellinger()


def arrays(seed: int = 0) -> dict[str, jax.Array]:
    """A batch of eight of whatever the functions take, by the names of their arguments."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(DEVICES, *shape)), jnp.float32)

    values = {
        name: -2 + normal(N)
        for name in ("log_pi", "log_a", "log_q", "log_p", "log_score", "rewards", "scores")
    }
    values |= {
        name: -2 + normal(N)
        for name in ("chosen_log_pi", "rejected_log_pi", "chosen_log_a", "rejected_log_a")
    }
    values |= {name: -2 + normal(N, T) for name in ("token_log_pi", "token_log_a", "token_log_q")}
    listed = ("listed_pi", "listed_p")
    values |= {name: jax.nn.log_softmax(normal(N)) for name in listed}
    features = jnp.asarray(rng.uniform(size=(DEVICES, 40, K)) < 0.5, jnp.float32)
    return values | {
        "advantages": normal(N),
        "log_scores": normal(3, N),
        "where": jnp.asarray(rng.uniform(size=(DEVICES, N)) < 0.7).at[:, :2].set(True),
        "token_where": jnp.ones((DEVICES, N, T), bool),
        "satisfied": jnp.asarray(rng.uniform(size=(DEVICES, N)) < 0.5).at[:, 0].set(True),
        "coefficients": normal(K),
        "row_features": features[:, :N],
        "features": features,
        "moments": jnp.full((DEVICES, K), 0.4),
        "log_t": normal(N),
    }


def _fields(divergence):
    return lambda log_t: [
        divergence.generator(log_t),
        divergence.derivative(log_t),
        divergence.integrand(log_t),
    ]


Z = estimators.Estimate(-1.0, 0.1, 8.0)
pref = ("chosen_log_pi", "rejected_log_pi", "chosen_log_a", "rejected_log_a")
grouped = ("token_log_pi", "token_log_q", "rewards")
# Function -> (how it is called, names of the arrays). Everything with arrays in a module's __all__
# must have a line.
CALLS = {
    divergences.exact_divergence: (partial(divergences.exact_divergence, divergence=F), ("listed_pi", "listed_p")),
    **{make: (_fields(make()), ("log_t",)) for make in (
        divergences.forward_kl, divergences.reverse_kl, divergences.total_variation, divergences.jensen_shannon,
        divergences.jeffreys, divergences.pearson_chi2, divergences.neyman_chi2, divergences.squared_hellinger,
        divergences.triangular_discrimination, divergences.chi2_mix,
    )},
    divergences.generalized_jensen_shannon: (_fields(divergences.generalized_jensen_shannon(0.3)), ("log_t",)),
    divergences.alpha_divergence: (_fields(divergences.alpha_divergence(0.3)), ("log_t",)),
    divergences.dual: (_fields(divergences.dual(F)), ("log_t",)),
    divergences.mixture: (_fields(divergences.mixture([F, divergences.forward_kl()], [1, 2])), ("log_t",)),
    divergences.from_generator: (_fields(divergences.from_generator(lambda t: (t - 1) ** 2)), ("log_t",)),
    targets.pointwise: (targets.pointwise, ("log_a", "satisfied")),
    targets.smoothed: (partial(targets.smoothed, epsilon=0.1), ("log_a", "satisfied")),
    targets.reward_tilted: (partial(targets.reward_tilted, beta=0.5), ("log_a", "rewards")),
    targets.product_of_experts: (targets.product_of_experts, ("log_scores",)),
    targets.exponential_family: (targets.exponential_family, ("log_a", "row_features", "coefficients")),
    targets.fit_coefficients: (
        lambda x, m: targets.fit_coefficients(x, m)._replace(steps=jnp.zeros(())), ("features", "moments")
    ),
    moments.fit_coefficients_over_contexts: (
        lambda x, m: moments.fit_coefficients_over_contexts(x.reshape(2, -1, K), m)._replace(steps=jnp.zeros(())),
        ("features", "moments"),
    ),
    estimators.effective_sample_size: (estimators.effective_sample_size, ("log_pi",)),
    estimators.pareto_k: (estimators.pareto_k, ("log_pi",)),
    estimators.estimate_log_z: (estimators.estimate_log_z, ("log_score", "log_q")),
    estimators.estimate_divergence: (
        lambda a, b, c, w: estimators.estimate_divergence(a, b, c, divergence=F, where=w), ("log_pi", "log_p", "log_q", "where")
    ),
    estimators.estimate_divergence_from_score: (
        partial(estimators.estimate_divergence_from_score, divergence=F), ("log_pi", "log_score", "log_q")
    ),
    estimators.estimate_mean: (estimators.estimate_mean, ("rewards", "log_pi")),
    estimators.estimate_kl_to_base: (estimators.estimate_kl_to_base, ("log_pi", "log_a", "log_q")),
    estimators.estimate_entropy: (estimators.estimate_entropy, ("log_pi", "log_q")),
    estimators.estimate_proposal_gain: (
        estimators.estimate_proposal_gain, ("log_pi", "log_a", "log_score", "log_q")
    ),
    estimators.estimate_divergence_from_halves: (
        lambda a, b, c, d: estimators.estimate_divergence_from_halves(a, b, c, d, Z, divergence=F, log_z_shares=jnp.exp(a)),
        ("log_pi", "log_score", "log_q", "log_p"),
    ),
    estimators.estimate_forward_kl_from_target: (
        lambda a, b: estimators.estimate_forward_kl_from_target(a, b, Z, log_z_shares=jnp.exp(a)), ("log_pi", "log_score")
    ),
    estimators.estimate_target_entropy: (
        lambda a, b: estimators.estimate_target_entropy(a, Z, log_z_shares=jnp.exp(b)), ("log_score", "log_pi")
    ),
    estimators.log_mixture: (partial(estimators.log_mixture, base_fraction=0.25), ("log_pi", "log_a")),
    estimators.init_log_mean: (lambda x: jax.tree.map(lambda y: y + 0 * x[0], estimators.init_log_mean().count), ("log_pi",)),
    estimators.update_log_mean: (
        lambda x: tuple(estimators.update_log_mean(estimators.init_log_mean(), x)), ("log_pi",)
    ),
    estimators.log_mean_estimate: (
        lambda x: estimators.log_mean_estimate(estimators.update_log_mean(estimators.init_log_mean(), x)), ("log_pi",)
    ),
    estimators.running_log_mean: (
        lambda x: tuple(estimators.running_log_mean().update(estimators.running_log_mean().init(), x)), ("log_pi",)
    ),
    surrogates.importance_weights: (surrogates.importance_weights, ("log_pi", "log_q")),
    surrogates.pseudo_rewards: (partial(surrogates.pseudo_rewards, divergence=F), ("log_pi", "log_p")),
    surrogates.score_weights: (partial(surrogates.score_weights, divergence=F), ("log_pi", "log_p", "log_q")),
    surrogates.leave_one_out: (surrogates.leave_one_out, ("scores",)),
    surrogates.centred_weights: (
        partial(surrogates.centred_weights, baseline=surrogates.leave_one_out), ("scores", "log_pi", "log_q")
    ),
    surrogates.surrogate_loss: (
        partial(surrogates.surrogate_loss, divergence=F, baseline=surrogates.leave_one_out), ("log_pi", "log_p", "log_q")
    ),
    surrogates.self_normalized: (lambda a, b, s: surrogates.self_normalized(a, b)(s), ("log_pi", "log_q", "scores")),
    surrogates.self_normalized_log_q: (surrogates.self_normalized_log_q, ("log_pi", "log_q")),
    surrogates.running_mean: (
        lambda x: surrogates.running_mean(0.5).update(surrogates.running_mean(0.5).init(), x), ("scores",)
    ),
    policy_gradients.k1: (policy_gradients.k1, ("log_pi", "log_a")),
    policy_gradients.k2: (policy_gradients.k2, ("log_pi", "log_a")),
    policy_gradients.k3: (policy_gradients.k3, ("log_pi", "log_a")),
    policy_gradients.k_estimator: (partial(policy_gradients.k_estimator, divergence=F), ("log_pi", "log_a")),
    policy_gradients.divergence_penalty: (
        partial(policy_gradients.divergence_penalty, divergence=F), ("log_pi", "log_a", "log_q")
    ),
    policy_gradients.kl_reward_to_go: (
        lambda a, b, w: policy_gradients.kl_reward_to_go(a, b, where=w), ("token_log_pi", "token_log_a", "token_where")
    ),
    policy_gradients.reinforce: (policy_gradients.reinforce, ("log_pi", "rewards")),
    policy_gradients.rloo: (policy_gradients.rloo, ("log_pi", "rewards")),
    policy_gradients.group_advantages: (policy_gradients.group_advantages, ("rewards",)),
    policy_gradients.ppo_clip: (policy_gradients.ppo_clip, ("log_pi", "log_q", "advantages")),
    policy_gradients.grpo: (lambda *x: policy_gradients.grpo(*x[:3], where=x[3]), (*grouped, "token_where")),
    policy_gradients.dr_grpo: (
        lambda *x: policy_gradients.dr_grpo(*x[:3], where=x[3], max_tokens=T), (*grouped, "token_where")
    ),
    policy_gradients.gspo: (lambda *x: policy_gradients.gspo(*x[:3], where=x[3]), (*grouped, "token_where")),
    policy_gradients.trajectory_balance: (policy_gradients.trajectory_balance, ("log_pi", "log_score")),
    policy_gradients.f_trajectory_balance: (partial(policy_gradients.f_trajectory_balance, divergence=F), ("log_pi", "log_p")),
    policy_gradients.f_regularized_optimum: (
        partial(policy_gradients.f_regularized_optimum, beta=0.5, divergence=F), ("listed_p", "rewards")
    ),
    preferences.dpo: (partial(preferences.dpo, beta=0.1), pref),
    preferences.f_dpo: (partial(preferences.f_dpo, beta=0.1, divergence=F), pref),
    preferences.chi_po: (partial(preferences.chi_po, beta=0.1, max_reward=1.0), pref),
    preferences.ipo: (partial(preferences.ipo, beta=0.1), pref),
    preferences.exo: (partial(preferences.exo, beta=0.1, reward_beta=1.0), ("log_pi", "log_a", "rewards")),
    preferences.exo_pair: (partial(preferences.exo_pair, beta=0.1), pref),
    preferences.f_po: (
        partial(preferences.f_po, beta=0.1, reward_beta=1.0, divergence=F), ("log_pi", "log_a", "rewards")
    ),
    enumeration.exact_log_z: (enumeration.exact_log_z, ("log_score",)),
    enumeration.factorize: (
        lambda x: enumeration.factorize(
            jnp.concatenate([x, x[:1]]), enumeration.sequences(3, 2, eos_id=0), vocab_size=3
        ), ("listed_p",),
    ),
    rejection.log_acceptance: (partial(rejection.log_acceptance, log_beta=0.0), ("log_score", "log_q")),
    rejection.choose_log_beta: (partial(rejection.choose_log_beta, acceptance_rate=0.3), ("log_score", "log_q")),
    rejection.estimate_rejection: (partial(rejection.estimate_rejection, log_beta=0.0), ("log_score", "log_q")),
    rejection.accept: (lambda a, b: rejection.accept(jax.random.key(0), a, b, log_beta=0.0) * 1.0, ("log_score", "log_q")),
}  # fmt: skip
# what makes spaces, policies or plain numbers, outside of any transformation; and what takes a
# function
HOST = {
    "sequences", "tabular_log_prob_fn", "exact_gradient", "expected_gradient", "expected_surrogate_gradient",
    "alpha_from_amari", "alpha_from_cressie_read", "alpha_from_f_dpo", "by_name", "names",
    "estimate_mean_over_contexts", "estimate_ratio", "estimate_win_rate", "over_contexts", "known_log_z",
}  # fmt: skip


def public_functions():
    for module in (
        divergences,
        targets,
        moments,
        estimators,
        surrogates,
        policy_gradients,
        preferences,
        enumeration,
        rejection,
    ):
        for name, function in vars(module).items():
            defined_here = getattr(function, "__module__", "").startswith(module.__name__)
            if (
                inspect.isfunction(function)
                and defined_here
                and not name.startswith("_")
                and name not in HOST
            ):
                yield function


def test_every_public_function_has_a_line():
    missing = {f.__name__ for f in public_functions()} - {f.__name__ for f in CALLS}
    assert not missing, missing


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b)


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_the_same_numbers_under_every_transformation(function):
    call, names = CALLS[function]
    batch = [arrays()[name] for name in names]

    def total(x, *others):
        leaves = [
            leaf
            for leaf in jax.tree.leaves(call(x, *others))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        return sum(jnp.where(jnp.isfinite(leaf), leaf, 0.0).sum() for leaf in leaves)

    def both(*x):
        # a solution by iteration; its gradient is not offered
        offered = function not in (
            targets.fit_coefficients,
            moments.fit_coefficients_over_contexts,
        )
        return call(*x), jax.grad(total)(*x) if offered else jnp.zeros(())

    compiled = jax.jit(both)
    close(call(*(x[0] for x in batch)), compiled(*(x[0] for x in batch))[0])
    plain = [compiled(*(x[i] for x in batch)) for i in range(DEVICES)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *plain)
    assert np.isfinite(expected[1]).all()
    mesh, rows = Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows")
    sharded = jax.shard_map(jax.vmap(both), mesh=mesh, in_specs=rows, out_specs=rows)
    # One program holds both: compiling is what takes the time.
    close((expected, expected), jax.jit(lambda *x: (jax.vmap(both)(*x), sharded(*x)))(*batch))
    close(expected[0], jax.pmap(call)(*batch))


SPREAD = {  # statistics over samples that are spread over devices
    "ess": lambda x, **o: estimators.effective_sample_size(x["log_pi"], **o),
    "pareto_k": lambda x, **o: estimators.pareto_k(x["log_pi"], **o),
    "log_z": lambda x, **o: estimators.estimate_log_z(x["log_score"], x["log_q"], **o),
    "divergence": lambda x, **o: estimators.estimate_divergence(
        x["log_pi"], x["log_p"], x["log_q"], divergence=F, where=x["where"], **o
    ),
    "from_score": lambda x, **o: estimators.estimate_divergence_from_score(x["log_pi"], x["log_score"], divergence=F, **o),
    "mean": lambda x, **o: estimators.estimate_mean(x["rewards"], x["log_pi"], where=x["where"], **o),
    "kl": lambda x, **o: estimators.estimate_kl_to_base(x["log_pi"], x["log_a"], **o),
    "entropy": lambda x, **o: estimators.estimate_entropy(x["log_pi"], x["log_q"], **o),
    "running": lambda x, **o: estimators.update_log_mean(estimators.init_log_mean(), x["log_pi"], where=x["where"], **o),
    "fit": lambda x, **o: targets.fit_coefficients(x["features"], jnp.full(K, 0.4), **o)._replace(steps=jnp.zeros(())),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPREAD)
def test_statistics_over_devices_are_those_of_all_samples(kind):
    call, batch = SPREAD[kind], arrays(1)
    names = ("log_pi", "log_p", "log_q", "log_score", "log_a", "rewards", "where", "features")
    batch = {name: batch[name] for name in names}
    together = call({name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()})
    mapped = jax.pmap(partial(call, axis_name="devices"), axis_name="devices")(batch)
    close(jax.tree.map(lambda x: jnp.stack([x] * DEVICES), together), mapped)
    mesh, rows = Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec("devices")
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
    sharded = jax.shard_map(
        partial(call, axis_name="devices"), mesh=mesh, in_specs=rows, out_specs=PartitionSpec()
    )
    close(together, jax.jit(sharded)(flat))


def test_leave_one_out_over_devices_leaves_one_out_of_all():
    scores = arrays(2)["scores"]
    expected = surrogates.leave_one_out(scores.ravel()).reshape(scores.shape)
    leave = partial(surrogates.leave_one_out, axis_name="devices")
    close(expected, jax.pmap(leave, axis_name="devices")(scores))
    mesh, rows = Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec("devices")
    close(
        expected.ravel(),
        jax.shard_map(leave, mesh=mesh, in_specs=rows, out_specs=rows)(scores.ravel()),
    )
    # one sample a device has others elsewhere
    single = jax.pmap(leave, axis_name="devices")(scores[:, :1])
    close(surrogates.leave_one_out(scores[:, 0]), single[:, 0])


def test_baselines_over_devices_are_those_of_all_samples():
    """Regression: self-normalised by each device's own samples, log q was another on each, and
    another than the whole's."""
    batch = arrays(3)
    rows = [batch[name].ravel() for name in ("log_pi", "log_q", "scores")]

    def all_three(log_pi, log_q, scores, **axis):
        running = surrogates.running_mean(0.5)
        value = running.value(running.update(running.init(), scores, **axis))
        return (
            surrogates.self_normalized_log_q(log_pi, log_q, **axis),
            surrogates.self_normalized(log_pi, log_q, **axis)(scores),
            jnp.full_like(scores, value),
        )

    mesh, spec = Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec("devices")
    spread = jax.shard_map(
        partial(all_three, axis_name="devices"), mesh=mesh, in_specs=spec, out_specs=spec
    )
    close(all_three(*rows), jax.jit(spread)(*rows))
