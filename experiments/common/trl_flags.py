"""Flags of TRL, and what they are here: for whoever types one of them.

Only those that fjax does not have under the same name; ``--beta``, ``--reward-weights``,
``--learning-rate`` and ``--seed``, say, are the same.
"""

_WHOLE = (
    "fjax draws from the whole distribution at temperature 1: p is made of the base model's own "
    "a(x), and every sample counts by π(x)/p(x), so that π must be what drew it. Sharpen the "
    "exported model where you serve it."
)
_VLLM = (
    "fjax draws by itself, compiled with the model; samples of another engine go into steps of "
    "your own (docs/how-to/outside-sampler.md)."
)
_UPLOAD = (
    "fjax sends nothing: the exported folder has its model card, and goes to the hub by `hf "
    "upload` (docs/how-to/serve.md)."
)
_QUANTISED = (
    "fjax has no flag for 4-bit base weights: --param-dtype bfloat16 halves them, and with "
    "--lora-rank there is one copy."
)
_DATA = (
    "fjax reads local files: prompts with --prompts FILE, pairs with --pairs FILE, as JSON lines "
    "(datasets writes them by to_json)."
)

ANSWERS = {
    # samples and steps
    "num_generations rloo_k": (
        "--samples is what a step draws in all: with prompts each of its --prompts-per-step gets "
        "--samples divided by that, as TRL's prompts get this many."
    ),
    "num_generations_eval": "--eval-samples says how many samples an evaluation draws in all.",
    "generation_batch_size per_device_train_batch_size train_batch_size": (
        "--samples is what a step draws and learns from, on all devices together; "
        "--microbatch-size is how many of them go through the model at once."
    ),
    "gradient_accumulation_steps": (
        "--microbatch-size says how many of a step's --samples go through the model at once; the "
        "result is the same for any."
    ),
    "per_device_eval_batch_size": "--eval-samples says how many samples an evaluation draws.",
    "steps_per_generation num_iterations num_ppo_epochs": (
        "--stages draw, and learn many times from all that was drawn, with the weights that makes "
        "right; --algorithm ppo goes over each batch twice, in four parts."
    ),
    "num_train_epochs": (
        "--steps says how long a run is: samples are drawn anew in each, so there is no data set "
        "to go through."
    ),
    "max_steps": "--steps.",
    "total_episodes": "--steps of --samples each.",
    # drawing
    "temperature": _WHOLE,
    "top_p top_k min_p repetition_penalty": _WHOLE,
    "max_completion_length response_length": "--max-new-tokens.",
    "max_prompt_length": (
        "--max-prompt-tokens, with --prompts-too-long for what becomes of longer ones."
    ),
    "max_length": "--max-prompt-tokens for the prompt, and --max-new-tokens for what follows.",
    "missing_eos_penalty stop_token mask_truncated_completions": (
        "a sample that reached --max-new-tokens counts as it stands; whether it is good is for "
        "your --reward or --predicate to say."
    ),
    "use_vllm vllm_mode vllm_server_host vllm_gpu_memory_utilization": _VLLM,
    # the target
    "kl_coef": (
        "--beta, the price of a nat of KL(π‖a), as in the target a(x)·exp(r(x)/β); it is never 0, "
        "for the target would be a single text."
    ),
    "reward_model_path reward_model_name_or_path reward_funcs": (
        "--reward is the folder of a reward model, or module:function."
    ),
    "scale_rewards whiten_rewards normalize_rewards": (
        "rewards count as they are: divided by their spread, --beta would mean another price in "
        "each step. The baseline takes their mean off."
    ),
    "loss_type": (
        "--divergence says what is minimised, --algorithm how; of pairs it is --loss, dpo among "
        "them."
    ),
    "epsilon epsilon_high cliprange": (
        "--algorithm ppo clips ratios at 1 ± 0.2; what --clip bounds is f' of --algorithm fdpg."
    ),
    "sync_ref_model ref_model_sync_steps": (
        "the base model stays: p is made of it. --proposal adaptive renews what is drawn from."
    ),
    # model and data
    "model_name_or_path sft_model_path": "--model.",
    "ref_model ref_model_name_or_path": (
        "--model is the base model, a; the policy begins as it, or with --start as another."
    ),
    "trust_remote_code": "fjax runs no code of a model's folder; --model says which it reads.",
    "dataset_name dataset_config dataset_train_split": _DATA,
    "dataset_test_split": "--unseen-prompts is a file of prompts to evaluate on.",
    "bf16 fp16": (
        "--dtype bfloat16 computes in it, --param-dtype bfloat16 keeps parameters and Adam in it; "
        "float16 is read and not computed in."
    ),
    "torch_dtype": "--dtype for the computation, --param-dtype for the parameters.",
    "gradient_checkpointing": "--remat.",
    "use_peft lora_r": "--lora-rank, which by itself asks for adapters.",
    "lora_target_modules": "--trainable, a regular expression on paths, with --lora-rank.",
    "lora_dropout": "adapters of --lora-rank have no dropout.",
    "load_in_4bit load_in_8bit": _QUANTISED,
    # optimiser
    "optim": "--optimizer, adam or sgd.",
    "lr_scheduler_type": "--decay lets the rate fall linearly to 0; without it, it stays.",
    "warmup_ratio": "--warmup-steps, a number of steps.",
    "weight_decay": "there is none: p itself is what holds the policy near the base model.",
    # the run
    "output_dir logging_dir": "--run-folder; without it a new folder under runs/ is made.",
    "overwrite_output_dir": (
        "fjax writes over no run: give another --run-folder, or go on with --resume."
    ),
    "run_name": "--run-folder names the run.",
    "report_to": (
        "--tensorboard, --wandb-project PROJECT, or both; metrics.jsonl is written anyway."
    ),
    "logging_steps logging_strategy": (
        "every step is in metrics.jsonl; --eval-every says how often fresh samples are measured."
    ),
    "log_completions num_completions_to_print": (
        "samples of each evaluation are in samples.jsonl, and with --tensorboard or "
        "--wandb-project in a table; --eval-every says how often."
    ),
    "save_steps save_strategy": "--checkpoint-every.",
    "save_total_limit": (
        "the two newest checkpoints and the nearest to the target are kept; --checkpoint-every "
        "says how often one is made."
    ),
    "eval_steps eval_strategy": "--eval-every.",
    "load_best_model_at_end": (
        "the exported model is the saved one nearest to the target, by --divergence."
    ),
    "early_stopping_patience": "--patience.",
    "resume_from_checkpoint": "--resume, or --resume-from with the step of a checkpoint.",
    "push_to_hub hub_model_id": _UPLOAD,
    "deepspeed fsdp": "--mesh, as in data=4,fsdp=2; of several hosts with --distributed.",
    "local_rank": "--distributed, or --coordinator with --processes and --process.",
}
"""Names, separated by spaces -> what to do, with flags of ours."""

TRL_FLAGS = {
    f"--{name.replace('_', '-')}": answer
    for names, answer in ANSWERS.items()
    for name in names.split()
}
"""One flag of theirs -> the same."""
