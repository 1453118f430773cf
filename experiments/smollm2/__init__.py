"""A real model aligned: SmolLM2-135M-Instruct, whose commands and figures are on the page beside.

python -m experiments.rlhf --reward experiments.smollm2.scorers:one_sentence ...
"""
