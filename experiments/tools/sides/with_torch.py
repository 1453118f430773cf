"""The same step by PyTorch and transformers: generate, forward, backward, Adam."""

import math
import os

import numpy as np

from fjax._optional import import_optional

from .work import BETAS, LEARNING_RATE, MAX_GRAD_NORM, Side, Work


def make(work: Work) -> Side:
    """Base model and policy are two copies, as they are in a trainer with a reference model."""
    # Else its threads wait for one another awake, and beside anything else that computes each
    # product takes a hundred times as long; to be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch = import_optional("torch", extra="parity")
    transformers = import_optional("transformers", extra="lm")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, policy = (
        transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).to(
            device
        )
        for _ in range(2)
    )
    config = policy.config
    start = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    # Without an end, and with the whole vocabulary: top_k is 50 where nothing is said.
    policy.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=0, pad_token_id=0
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE, betas=BETAS)

    def log_probs(model, tokens):
        logits = model(tokens).logits[:, :-1]
        chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        return (chosen - logits.logsumexp(-1)).sum(-1)

    @torch.no_grad()
    def draw() -> np.ndarray:
        prompt = torch.full((work.samples, 1), start, device=device)
        mask = torch.ones_like(prompt)
        drawn = policy.generate(prompt, attention_mask=mask, max_new_tokens=work.new_tokens)
        return drawn.cpu().numpy()

    @torch.no_grad()
    def score(tokens: np.ndarray) -> np.ndarray:
        rows = torch.tensor(tokens, dtype=torch.long, device=device)
        return torch.stack([log_probs(model, rows) for model in (base, policy)]).cpu().numpy()

    def update(tokens: np.ndarray, log_score: np.ndarray, log_q: np.ndarray) -> float:
        rows = torch.tensor(tokens, dtype=torch.long, device=device)
        log_p, log_q_ = (torch.tensor(x, device=device) for x in (log_score, log_q))
        optimizer.zero_grad()
        log_pi = log_probs(policy, rows)
        log_t = log_pi.detach() - log_p
        # f' of Jensen–Shannon is ½ log(2t/(1 + t))
        slope = 0.5 * (math.log(2) - torch.nn.functional.softplus(-log_t))
        loss = ((log_pi.detach() - log_q_).exp() * slope * log_pi).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return loss.item()

    def numbers() -> tuple[int, int]:
        there = sum(parameter.numel() for parameter in policy.parameters())
        return there, there

    return Side(draw, score, update, numbers)
