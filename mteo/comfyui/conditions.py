"""Conditionings for training: as normal tensors, told apart by content, and stacked so that one batch mixes prompts."""
import hashlib
from functools import partial
from operator import itemgetter
from types import CellType

import torch

from ..errors import MTEOError


def normal(value):
    """Conditioning made under inference mode, as normal tensors."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {key: normal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(normal(item) for item in value)
    return value


def require_trainable(conditionings: list) -> None:
    """MTEOError where one has a ControlNet, whose own network no gradient goes through."""
    if any("control" in facts for conditioning in conditionings for _, facts in conditioning):
        raise MTEOError("A conditioning has a ControlNet, through which no table can be trained: distil without it. In sampling it goes with any table.")


# By these one LoRA, or hook in a conditioning, is not another, also where another object holds it.
TELLING = ("hooks", "weights", "_strength_model", "hook_keyframe", "keyframes", "strength", "start_percent", "guarantee_steps")
WORDS = (str, int, float, bool, type(None))
NAMES = (*WORDS, tuple)


def content_hash(value) -> str:
    """sha256 over the numbers and words of a conditioning, or of a MODEL's patches or options. Functions count by their name, the numbers and words that they
    close over, and the object that they are a method of; an object by its type's name, what is TELLING and the tensors, numbers and words that it holds, or
    where another object holds it by the first two. None counts as nothing: a patch that is used may keep something in its place."""
    digest = hashlib.sha256()

    def feed(item, held=False):
        if torch.is_tensor(item):
            digest.update(str((item.dtype, tuple(item.shape))).encode())
            digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for name, part in sorted(((str(key) if isinstance(key, NAMES) else type(key).__name__, part) for key, part in item.items()), key=itemgetter(0)):
                digest.update(name.encode())
                feed(part, held)
        elif isinstance(item, (list, tuple)):
            digest.update(f"[{len(item)}".encode())
            for part in item:
                feed(part, held)
        elif isinstance(item, WORDS):
            digest.update(repr(item).encode())
        elif isinstance(item, partial):
            feed([item.func, item.args, item.keywords], held)
        elif hasattr(item, "__code__"):
            digest.update(item.__qualname__.encode())
            feed([words_of(cell.cell_contents) for cell in item.__closure__ or () if cell != CellType()])
            feed(getattr(item, "__self__", None), held)
        else:
            digest.update(type(item).__name__.encode())
            own = getattr(item, "__dict__", {})
            feed({name: value for name, value in own.items() if name in TELLING}, held=True)
            if not held and not isinstance(item, torch.nn.Module):
                feed({name: words_of(value, torch.Tensor) for name, value in own.items() if name not in TELLING})

    feed(value)
    return digest.hexdigest()


def words_of(value, *also: type):
    """`value` with None in place of all in it that is no number, word or one of the types `also`."""
    if isinstance(value, dict):
        return {key: words_of(item, *also) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [words_of(item, *also) for item in value]
    return value if isinstance(value, (*WORDS, *also)) else None


# What an entry may hold beside its encoded `model_conds` and still be stacked: inputs of that encoding, nothing that acts by itself.
ENCODED = {"model_conds", "uuid", "cross_attn", "pooled_output", "attention_mask", "guidance"}
ENCODED |= {"width", "height", "crop_w", "crop_h", "target_width", "target_height"}


def stackable(prompts: list[list[dict]]) -> bool:
    """True where each prompt is one entry, without area, mask, ControlNet or hooks, whose encoded tensors ComfyUI would put in one batch: of equal shape [17],
    or texts of other lengths, which it repeats where that changes nothing."""
    if any(len(prompt) != 1 or not ENCODED.issuperset(prompt[0]) for prompt in prompts):
        return False
    first, *others = (prompt[0]["model_conds"] for prompt in prompts)
    if not all(torch.is_tensor(getattr(cond, "cond", None)) for conds in (first, *others) for cond in conds.values()):
        return False
    return all(conds.keys() == first.keys() and all(cond.can_concat(conds[key]) for key, cond in first.items()) for conds in others)


def stack(prompts: list[list[dict]], items: list[int]) -> list[dict]:
    """One condition whose row b is that of prompt items[b]."""
    own, *others = (prompts[item][0] for item in items)
    joined = {key: type(cond)(cond.concat([other["model_conds"][key] for other in others])) for key, cond in own["model_conds"].items()}
    return [{**own, "model_conds": joined}]
