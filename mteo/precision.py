"""Which processors multiply short numbers themselves: on the others bfloat16 takes many times as long as float32."""
import torch


def multiplies_bfloat16() -> bool:
    """Whether the processor does (AVX-512 BF16, with or without AMX); False where PyTorch does not say."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
