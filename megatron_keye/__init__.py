"""megatron_keye: train Keye-VL-class vision-language models on Megatron-core."""

__version__ = "0.1.0"
