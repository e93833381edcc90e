"""Learning rate over steps: linear warm-up, then cosine decay to a fraction of the peak."""

import math

from megatron_keye.config.schema import RunConfig


def lr_factor(step: int, config: RunConfig) -> float:
    """Factor on the peak learning rate at `step` (from 0). The first step already trains: warm-up ends at factor 1 after
    `warmup_steps` steps."""
    settings = config.optimizer
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    decay_steps = max((settings.decay_steps or config.train.steps) - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps) / decay_steps, 1.0)
    return settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
