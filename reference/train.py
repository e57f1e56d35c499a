"""Train a reference model and its text encoder on scenes made on the fly: python -m reference.train --comfyui PATH --model unet|mmdit

ε-prediction on the discrete SD1.x schedule or flow matching, 10 % of prompts dropped, bfloat16 where the processor has it, EMA of the weights.
The same command goes on where it was stopped; `run` holds the state, `weights` what ships (float16, ≤ 20 MB).
"""
import argparse
import json
import math
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mteo.precision import multiplies_bfloat16

from . import latents, network, scenes
from .vocabulary import padded

HERE = Path(__file__).parent
ATTENTION = {
    "cpu": [SDPBackend.MATH],  # the fused one's backward takes a third of a step
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


@cache
def sigmas_of_sd1(steps=1000, start=0.00085, end=0.012) -> torch.Tensor:
    """σ of the 1000 discrete steps of SD1.x: β linear in its root, σ² = (1 − ᾱ)/ᾱ (float32)."""
    beta = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)
    return ((1 - kept) / kept).sqrt().float()


def weight_of(sigma: torch.Tensor, spread: float = latents.SPREAD) -> torch.Tensor:
    """Weight of a squared ε error at σ: what is drawn is decided at σ from 1 to 5, where plain ε errors are small.

    √(1 + (σ/spread)²) gives every σ above the latents' spread about the same gradient (the error of ε there is that of x₀ ÷ σ);
    below σ = .5 it falls with σ, as noise that cannot be told from texture teaches nothing (after min-SNR, arXiv 2303.09556).
    """
    return (1 + (sigma / spread) ** 2).sqrt() * (2 * sigma).clamp_max(1)


class KeepNormInputs(TorchFunctionMode):
    """ComfyUI's CLIP layer adds in place to what LayerNorm has kept for the backward pass: give LayerNorm a copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.layer_norm:
            args = (args[0].clone(), *args[1:])
        return function(*args, **(kwargs or {}))


class Pair(torch.nn.Module):
    """The two networks that are trained together; keys as they ship: unet.* or mmdit.*, text.*"""

    def __init__(self, kind: str):
        super().__init__()
        import comfy.ops

        self.kind = kind
        self.add_module(kind, network.BUILD[kind](comfy.ops.disable_weight_init))
        self.text = network.build_text_encoder(comfy.ops.disable_weight_init)
        initialise(self)

    def forward(self, x, t, tokens):
        with KeepNormInputs():
            context, _, _, pooled = self.text(tokens)
        return getattr(self, self.kind)(x, t, context=context, **({"y": pooled} if self.kind == "mmdit" else {}))


def noised_for_unet(x, generator):
    """ε-prediction: (what the network reads, its time, what it shall answer, the weight of that) for latents x [B, C, H, W]."""
    t = torch.randint(1000, (len(x),), generator=generator)
    sigma, noise = sigmas_of_sd1()[t].view(-1, 1, 1, 1), torch.randn(x.shape, generator=generator)
    return (x + sigma * noise) / (1 + sigma**2).sqrt(), t.float(), noise, weight_of(sigma)  # EPS scaling of the input


def noised_for_mmdit(x, generator, centre: float = 0.5):
    """As noised_for_unet for flow matching: x_σ = (1 − σ)·x + σ·noise, answer noise − x; logit σ normal about `centre` (SD3, arXiv
    2403.03206, eq. 19), as what is drawn is decided at σ from .45 to .85."""
    sigma = (centre + torch.randn(len(x), 1, 1, 1, generator=generator)).sigmoid()
    noise = torch.randn(x.shape, generator=generator)
    return (1 - sigma) * x + sigma * noise, 1000 * sigma.flatten(), noise - x, torch.ones(())


NOISED = {"unet": noised_for_unet, "mmdit": noised_for_mmdit}


def optimisers_of(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the MMDiT's blocks, AdamW for all else. After 20,000 images Muon's loss is .77 where AdamW's is .88;
    its rate of 8 times AdamW's is the best of three."""
    inside = [value for name, value in model.named_parameters() if ".joint_blocks." in name and value.dim() == 2]
    chosen = {id(value) for value in inside}
    made = [torch.optim.AdamW([value for value in model.parameters() if id(value) not in chosen], lr=rate, betas=(0.9, 0.99), weight_decay=0.01)]
    if inside:
        made.append(torch.optim.Muon(inside, lr=8 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return made


def initialise(model: torch.nn.Module) -> None:
    """PyTorch's defaults where ComfyUI leaves memory as it is; the last layer of every residual branch starts at zero."""
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith(("out_layers.3", "proj_out", "unet.out.2", "adaLN_modulation.1", "final_layer.linear")):
                torch.nn.init.zeros_(module.weight)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)) and module.weight is not None:
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif name.endswith((".ln_q", ".ln_k")):  # comfy's own RMSNorm
            torch.nn.init.ones_(module.weight)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02 if "position" in name else 0.5)


def batch_of(count, sprites, vae, pca, drop, generator, style="colour", size=scenes.SIZE):
    """Latents [B, C, H, W] of unit-like scale, tokens [B, LENGTH] and [B] whether the prompt is empty, as a share `drop` of them is."""
    names = scenes.draw_names(count, generator)
    raw = vae.encode(scenes.STYLES[style](scenes.compose(names, sprites, generator, size)))
    texts = scenes.prompts(names)
    dropped = torch.rand(count, generator=generator) < drop
    tokens = torch.tensor([padded("" if gone else text) for text, gone in zip(texts, dropped.tolist(), strict=True)])
    return latents.scaled(raw, pca), tokens, dropped


def guided(target, predicted, without, dropped, scale: float):
    """The target that a network with guidance inside learns (model guidance, arXiv 2502.12154): where there is a prompt, target + (1 − 1/scale)·(its own answer
    − that to an empty prompt). At rest the answer is then what cfg `scale` made of the network before."""
    share = (1 - 1 / scale) * (~dropped).float().view(-1, 1, 1, 1)
    return target + share * (predicted.detach().float() - without.float()).to(target.device)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="root of ComfyUI's sources")
    parser.add_argument("--model", choices=network.BUILD, default="unet")
    parser.add_argument("--run", type=Path, help="default: runs/MODEL beside this file")
    parser.add_argument("--weights", type=Path, help="default: weights/MODEL.safetensors beside this file")
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--warm", type=int, default=20_000, help="images of linear warm-up")
    parser.add_argument("--ship-every", type=int, default=60_000, help="images between two writings of state and weights")
    parser.add_argument("--guidance", type=float, default=1.0, help="cfg that the answer to a prompt has in it when it is trained; 1: none")
    parser.add_argument("--style", choices=scenes.STYLES, default="colour", help="other than colour: to fine-tune a copy of the weights")
    parser.add_argument("--size", type=int, default=scenes.SIZE, help="side of a scene in pixels; other than the default: to fine-tune a copy of the weights")
    parser.add_argument("--compile", action="store_true", help="twice as fast where a C++ compiler is at hand")
    parser.add_argument("--tune", action="store_true", help="rate and average are those of a training that begins with the weights at hand")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (restartable) after this long")
    options = parser.parse_args(arguments)
    options.run = options.run or HERE / "runs" / options.model
    options.weights = options.weights or HERE / "weights" / f"{options.model}.safetensors"
    sys.path.insert(0, options.comfyui)
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.run.mkdir(parents=True, exist_ok=True)
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    sprites = scenes.load_sprites()
    generator = torch.Generator().manual_seed(0)
    state_file, seen, begun, spent = options.run / "state.pt", 0, 0, 0.0
    model = Pair(options.model).to(device).to(memory_format=torch.channels_last)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimisers = optimisers_of(model, options.rate)
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, own in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(own)
        average, seen, begun, spent, pca = state["average"], state["seen"], state["begun"], state["spent"], state["pca"]
        generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch"].cpu())
    elif options.weights.exists():  # only what ships is at hand: go on from it with a fresh optimiser
        shipped = load_file(options.weights)
        pca = {name: shipped.pop(f"vae.{name}").float() for name in ("basis", "mean", "scale")}
        seen = int(shipped.pop("images"))
        begun = seen if options.tune else 0
        generator.manual_seed(seen + 1)
        model.load_state_dict({name: value.float() for name, value in shipped.items()})
        average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if (before := options.weights.with_suffix(".log.jsonl")).exists():
            shutil.copy(before, options.run / "log.jsonl")
    else:
        pca = latents.fit(scenes.compose(scenes.draw_names(8192, generator), sprites, generator), *latents.SHAPES[options.model])
    if seen >= options.images:
        raise SystemExit(f"The weights have seen {seen:,} images: say with --images up to how many they are to be trained on.")
    vae, empty = latents.LinearVAE(pca["basis"]), torch.tensor([padded("")])
    if options.compile:
        getattr(model, options.model).compile()
    log, started, mark, written, recent = (options.run / "log.jsonl").open("a"), time.time(), time.time(), seen, []

    def write():
        torch.save(
            dict(
                model=model.state_dict(),
                optimisers=[optimiser.state_dict() for optimiser in optimisers],
                average=average,
                seen=seen,
                begun=begun,
                spent=spent + time.time() - started,
                pca=pca,
                generator=generator.get_state(),
                torch=torch.get_rng_state(),
            ),
            state_file.with_suffix(".new"),
        )
        state_file.with_suffix(".new").replace(state_file)
        shipped = {name: value.half().contiguous().cpu() for name, value in average.items()}
        shipped |= {f"vae.{name}": value.contiguous() for name, value in pca.items()} | {"images": torch.tensor(seen)}
        save_file(shipped, options.weights.with_suffix(".new"), {"license": "MIT", "images": str(seen), "data": scenes.DATA})
        options.weights.with_suffix(".new").replace(options.weights)
        shutil.copy(options.run / "log.jsonl", options.weights.with_suffix(".log.jsonl"))

    while seen < options.images and time.time() - started < 60 * options.minutes:
        x, tokens, dropped = batch_of(options.batch, sprites, vae, pca, 0.1, generator, options.style, options.size)
        noisy, t, target, weight = NOISED[options.model](x, generator)
        left = 1 - (seen - begun) / (options.images - begun)
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * min(1.0, (seen - begun + options.batch) / options.warm) * min(1.0, 5 * left + 0.02)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or multiplies_bfloat16()), sdpa_kernel(ATTENTION[device]):
            told = noisy.to(device, memory_format=torch.channels_last), t.to(device)
            predicted = model(*told, tokens.to(device))
            if options.guidance != 1:
                with torch.no_grad():
                    target = guided(target, predicted, model(*told, empty.expand_as(tokens).to(device)), dropped, options.guidance)
        loss = (weight.to(device) * (predicted.float() - target.to(device)).square()).mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        seen += options.batch
        keep = min(0.9995, 1 - 1 / (1 + ((seen - begun) / options.batch) / 10))
        with torch.no_grad():
            current = model.state_dict()
            torch._foreach_lerp_(list(average.values()), list(current.values()), 1 - keep)
        recent.append(float(loss.detach()))
        if len(recent) == 25:
            speed = 25 * options.batch / (time.time() - mark)
            line = dict(
                images=seen,
                loss=round(sum(recent) / 25, 5),
                rate=optimisers[0].param_groups[0]["lr"],
                images_per_s=round(speed, 1),
                hours=round((spent + time.time() - started) / 3600, 3),
            )
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(line, flush=True)
            recent, mark = [], time.time()
        if seen - written >= options.ship_every:
            write()
            written = seen
    write()


if __name__ == "__main__":
    main()
