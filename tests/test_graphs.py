"""What an artist's graph has beside a table: a mask, a second output, another start, other guiders, LoRAs, a ControlNet."""
import json
from pathlib import Path

import pytest
import torch

TABLES = Path(__file__).resolve().parent.parent / "reference" / "tables"


def table_of(name: str = "reference-3steps"):
    from mteo.embeddings import load_embeddings

    return load_embeddings(TABLES / f"{name}.safetensors")


@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("parts", "reference-3steps"), ("transformer_parts", "reference-mmdit-4steps-guided-1-3")])
def test_what_a_mask_protects_stays_as_it_was(request, no_gradients, kind, name, changing):
    """ComfyUI's own samplers end with the last evaluation, a table with a blend of all; the mask may change with σ (Differential Diffusion)."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    from mteo.comfyui.sampling import sample_latent

    model, positives, negative, empty = request.getfixturevalue(kind)
    source, half = torch.randn(empty.shape, generator=torch.Generator().manual_seed(3)), empty.shape[-1] // 2
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    patched = DifferentialDiffusion.execute(model)[0] if changing else model
    made = sample_latent(patched, table_of(name), dict(samples=source, noise_mask=mask), 7, positives[0], negative, cfg=4.0)["samples"]
    assert made[..., : half - 1].allclose(source[..., : half - 1], atol=1e-5) and (made - source)[..., half + 1 :].std() > 0.1


def test_both_outputs_of_a_sampler_are_the_picture(parts, no_gradients):
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    from mteo.comfyui.sampling import applied

    model, positives, negative, empty = parts
    patched, sampler, sigmas = applied(model, table_of())
    output, denoised = SamplerCustom.execute(patched, True, 7, 4.0, positives[0], negative, sampler, sigmas, dict(samples=empty)).args
    assert torch.equal(output["samples"], denoised["samples"]) and output["samples"].std() > 0.1


def test_stopping_early_leaves_the_noise_that_the_sigmas_say(parts, no_gradients):
    """The calls of a table with σ of its own at each cfg value are not at the SIGMAS, which are their mean."""
    import comfy.sample

    from mteo.comfyui.sampling import applied, sample_latent

    model, positives, negative, empty = parts
    own, seen = table_of(), []
    patched, sampler, sigmas = applied(model, own)
    noise, keep = comfy.sample.prepare_noise(empty, 7), lambda step, denoised, x, steps: seen.append(x.clone())
    comfy.sample.sample_custom(patched, noise, 4.0, sampler, sigmas, positives[0], negative, empty, seed=7, callback=keep)
    told = own.tables[3].tableau_at(4.0).sigmas
    early = lambda **more: sample_latent(model, own, dict(samples=empty), 7, positives[0], negative, cfg=4.0, end_step=2, **more)["samples"]
    take = lambda **more: model.model.process_latent_in(early(**more))
    noisy, denoised = take(return_with_leftover_noise=True), take()
    assert abs(float(told[2] / sigmas[2]) - 1) > 0.1, "else there is nothing to see"
    assert torch.allclose((noisy - denoised) / sigmas[2], (seen[2] - denoised) / float(told[2]), atol=1e-4)


def test_another_guidance_than_the_tables_is_said(parts, no_gradients, caplog):
    from comfy_extras.nodes_custom_sampler import CFGOverride

    from mteo.comfyui.sampling import sample_latent
    from mteo.errors import MTEOError

    model, positives, negative, empty = parts
    take = lambda of, table, cfg: sample_latent(of, table_of(table), dict(samples=empty), 7, positives[0], negative, cfg=cfg)
    with pytest.raises(MTEOError, match="CFG Override, changes the guidance: remove that node"):
        take(CFGOverride.execute(model, 1.0, 0.5, 1.0)[0], "reference-4steps-guided-1-3", 4.0)
    assert not caplog.records
    take(CFGOverride.execute(model, 1.0, 0.5, 1.0)[0], "reference-3steps", 4.0)
    assert "such as CFG Override or APG, may change the guidance" in caplog.text
    take(model, "reference-3steps", 7.0)
    assert "cfg is 7, and this table was trained for 1 to 4" in caplog.text


@pytest.mark.parametrize("more", [dict(strength=0.0), dict(off_grid="interpolate"), dict(off_grid="off")])
def test_a_tables_own_sampler_runs_its_own_schedule_only(parts, no_gradients, more):
    from mteo.comfyui.sampling import sample_latent
    from mteo.errors import MTEOError

    model, positives, negative, empty = parts
    with pytest.raises(MTEOError, match="not trained for a start at step 1"):
        sample_latent(model, table_of(), dict(samples=empty), 7, positives[0], negative, cfg=4.0, start_step=1, **more)


@pytest.mark.parametrize("solver", ["heun", "dpm_2"])
def test_a_learned_table_of_two_calls_a_step_stops_where_its_solver_does(parts, no_gradients, solver):
    import comfy.sample
    import comfy.samplers

    from mteo.comfyui.sampling import sample_latent
    from mteo.comfyui.solver import read_tableau
    from mteo.comfyui.training import named_grid, untrained_table
    from mteo.embeddings import Embeddings

    model, positives, negative, empty = parts
    sampling, sampler = model.get_model_object("model_sampling"), comfy.samplers.sampler_object(solver)
    sigmas = named_grid(sampling, "sgm_uniform", 3)
    table = untrained_table(model.model.diffusion_model, sampling, "gains", sigmas, solver, read_tableau(sampler, sigmas, sampling))
    table.learned = [table.tableau]
    for end in (1, 2, 3):
        made = sample_latent(
            model, Embeddings({3: table}, "gains"), dict(samples=empty), 7, positives[0], negative, cfg=4.0, end_step=end, return_with_leftover_noise=True
        )
        noise = comfy.sample.prepare_noise(empty, 7)
        stock = comfy.sample.sample_custom(model, noise, 4.0, sampler, sigmas[: end + 1], positives[0], negative, empty, seed=7, disable_pbar=True)
        assert made["samples"].allclose(stock, atol=1e-4 * float(stock.abs().max())), end


def test_a_guider_of_two_cfg_values_gets_the_rows_of_its_own(parts, no_gradients):
    """With one negative for both, DualCFGGuider is CFGGuider; a table that guides in some steps only refuses it, whatever passed before."""
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG

    from mteo.comfyui.sampling import applied
    from mteo.errors import MTEOError

    model, positives, negative, empty = parts
    noise = comfy.sample.prepare_noise(empty, 7)

    def guider_of(kind, patched):
        guider = kind(patched)
        if kind is Guider_DualCFG:
            guider.set_conds(positives[0], negative, negative)
            guider.set_cfg(4.0, 1.0)
        elif kind is Guider_Basic:
            guider.set_conds(positives[0])
        else:
            guider.set_conds(positives[0], negative)
            guider.set_cfg(4.0)
        return guider

    patched, sampler, sigmas = applied(model, table_of())
    go = lambda kind: guider_of(kind, patched).sample(noise, empty, sampler, sigmas, seed=7, disable_pbar=True)
    assert torch.equal(go(comfy.samplers.CFGGuider), go(Guider_DualCFG))
    patched, sampler, sigmas = applied(model, table_of("reference-4steps-guided-1-3"))
    go(Guider_Basic)
    with pytest.raises(MTEOError, match="guides in some steps only, which Guider_DualCFG cannot"):
        go(Guider_DualCFG)


def test_a_run_knows_the_model_that_it_is_of(parts, transformer_parts, no_gradients):
    """LoRA, shift, options of a SAMPLER and LoRAs in a conditioning make another table; the same LoRA loaded again does not."""
    import comfy.hooks
    import comfy.samplers
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    from mteo.comfyui.training import facts_of
    from mteo.recipe import Recipe

    model, positives, negative, empty = parts
    key = "diffusion_model.middle_block.0.emb_layers.1.weight"
    shape = model.model.state_dict()[key].shape

    def low_rank(seed: int) -> dict:
        generator, sizes = torch.Generator().manual_seed(seed), dict(up=(shape[0], 2), down=(2, shape[1]))
        return {key.replace("weight", f"lora_{name}.weight"): torch.randn(size, generator=generator) for name, size in sizes.items()}

    with_lora = lambda seed, strength=1.0: comfy.sd.load_lora_for_models(model, None, low_rank(seed), strength, 0.0)[0]
    hooked = lambda strength: comfy.hooks.set_hooks_for_conditioning(positives[0], comfy.hooks.create_hook_lora(low_rank(1), strength, 0.0))
    facts = lambda of=model, prompts=positives, sampler=None: json.dumps(facts_of(of, prompts, negative, empty, Recipe(), sampler), sort_keys=True)
    assert facts(with_lora(1)) == facts(with_lora(1))
    of_order = lambda order: facts(sampler=comfy.samplers.ksampler("lms", {"order": order}))
    loras = [facts(), facts(with_lora(1)), facts(with_lora(2)), facts(with_lora(1, 0.5))]
    assert len(set(loras + [facts(prompts=[hooked(1.0)]), facts(prompts=[hooked(-1.0)]), of_order(4), of_order(1)])) == 8
    others = [json.dumps(facts_of(model, positives, *other, Recipe()), sort_keys=True) for other in ((positives[1], empty), (negative, empty[..., 1:]))]
    assert len({facts(), *others}) == 3, "another negative, another size"
    flow, flow_positives, flow_negative, flow_empty = transformer_parts
    one, six = (facts_of(ModelSamplingSD3().patch(flow, shift)[0], flow_positives, flow_negative, flow_empty, Recipe()) for shift in (1.0, 6.0))
    assert one != six


def test_a_run_knows_what_patches_the_model(parts, transformer_parts, no_gradients):
    """Numbers that ComfyUI's patches keep in containers and objects make another table; what a patch keeps while it works does not."""
    import comfy.clip_vision
    import comfy.sample
    from comfy_extras.nodes_easycache import EasyCacheNode
    from comfy_extras.nodes_freelunch import FreeU
    from comfy_extras.nodes_sag import SelfAttentionGuidance
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
    from comfy_extras.nodes_tomesd import TomePatchModel

    from mteo.comfyui.training import facts_of
    from mteo.recipe import Recipe
    from nodes import unCLIPConditioning

    def facts(model, of=parts, positives=None):
        return json.dumps(facts_of(model, positives or of[1], *of[2:], Recipe()), sort_keys=True)

    (model, positives, negative, empty), flow = parts, transformer_parts[0]

    def seen(vision: float) -> list:
        image = comfy.clip_vision.Output()
        image.image_embeds = torch.full((1, 4), vision)
        return [unCLIPConditioning().apply_adm(positive, image, 1.0, 0.0)[0] for positive in positives]

    for of in (
        lambda value: facts(FreeU.execute(model, 1 + value, 1.2, 0.9, 0.2)[0]),
        lambda value: facts(EasyCacheNode.execute(model, value, 0.15, 0.95, False)[0]),
        lambda value: facts(SkipLayerGuidanceDiT.execute(flow, 3.0, 0.01, 0.15, double_layers=f"{value / 0.1:.0f}", single_layers="")[0], transformer_parts),
        lambda value: facts(model, positives=seen(value)),
    ):
        assert of(0.1) == of(0.1) != of(0.2) != facts(model)
    for used in (TomePatchModel.execute(model, 0.3)[0], SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]):
        before, noise = facts(used), torch.randn(empty.shape, generator=torch.Generator().manual_seed(0))
        comfy.sample.sample_custom(used, noise, 4.0, comfy.samplers.sampler_object("euler"), torch.tensor([14.6, 2.0, 0.0]), positives[0], negative, empty)
        assert facts(used) == before != facts(model)


def test_a_training_takes_the_table_off_and_refuses_a_controlnet(parts, no_gradients):
    from mteo.comfyui.patch import KEY, apply_embeddings
    from mteo.comfyui.session import private_copy
    from mteo.comfyui.training import distill_model
    from mteo.errors import MTEOError
    from mteo.recipe import Recipe

    model, positives, negative, empty = parts
    patched, _ = apply_embeddings(model, table_of())
    assert KEY in patched.attachments and KEY not in private_copy(patched).attachments and KEY in patched.attachments
    controlled = [[text, dict(facts, control=object())] for text, facts in positives[0]]
    for conditions in (([controlled], negative), ([positives[0]], controlled)):
        with pytest.raises(MTEOError, match="A conditioning has a ControlNet, .*: distil without it"):
            distill_model(model, *conditions, empty, Recipe())


def test_a_solver_of_two_calls_a_step_is_distilled(parts, no_gradients):
    from mteo.comfyui.training import distill_model
    from mteo.recipe import Recipe

    recipe = Recipe(solver="heun", grid="sgm_uniform", iterations=2, batch=4, validate_every=2, pictures=8, held_out=8, teacher_steps=6)
    table = distill_model(*parts, recipe).embeddings.tables[3]
    assert table.tableau.rows == (0, 1, 1, 2, 2) and not torch.equal(table.learned[0].matrix, table.tableau.matrix)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mteo.tables", {}), ("mteo.tables", []), ("mteo.model", None), ("mteo.model", dict(fingerprint=3)), ("sigmas", [1, 2, 3, 4])),
        *(("timesteps", ["x"] * 3), ("guidance", [4.0, 1.0]), ("guidance", [1.0, 2.0, 4.0])),
    ],
)
def test_a_header_that_was_edited_is_refused(tmp_path, name, value):
    from mteo.embeddings import load_embeddings
    from mteo.errors import MTEOError

    data = (TABLES / "reference-3steps.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if not name.startswith("mteo."):
        tables = json.loads(header["__metadata__"]["mteo.tables"])
        tables["3"][name] = value
        name, value = "mteo.tables", tables
    header["__metadata__"][name] = json.dumps(value)
    text = json.dumps(header).encode()
    (tmp_path / "edited.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(MTEOError, match="^edited.safetensors is not complete"):
        load_embeddings(tmp_path / "edited.safetensors")


def test_a_model_that_is_split_over_several_cards_is_refused_and_trained_on_one(parts, no_gradients):
    from mteo.comfyui.sampling import sample_latent
    from mteo.comfyui.session import private_copy, training_mode
    from mteo.errors import MTEOError

    model, positives, negative, empty = parts
    split = model.clone()
    split.set_additional_models("multigpu", [model.clone()])
    with pytest.raises(MTEOError, match="split over several: remove the MultiGPU node"):
        sample_latent(split, table_of(), dict(samples=empty), 7, positives[0], negative, cfg=4.0)
    with training_mode():
        assert private_copy(split).get_additional_models_with_key("multigpu") == []
    assert len(split.get_additional_models_with_key("multigpu")) == 1


def test_a_tables_sampler_without_its_model_is_refused(parts, no_gradients):
    """At strength 0 there is nothing on the model to miss."""
    import comfy.sample

    from mteo.comfyui.sampling import applied
    from mteo.errors import MTEOError

    model, positives, negative, empty = parts

    def take(strength: float):
        _, sampler, sigmas = applied(model, table_of(), strength=strength)
        noise = comfy.sample.prepare_noise(empty, 7)
        return comfy.sample.sample_custom(model, noise, 4.0, sampler, sigmas, positives[0], negative, empty, seed=7, disable_pbar=True)

    with pytest.raises(MTEOError, match="connect the MODEL output of Apply MTEO, too"):
        take(1.0)
    assert take(0.0).isfinite().all()


def test_a_node_through_which_no_gradient_comes_is_told_before_the_work(parts, no_gradients):
    from comfy_extras.nodes_nag import NAGuidance

    from mteo.comfyui.training import distill_model
    from mteo.errors import MTEOError
    from mteo.recipe import Recipe

    stages, patched = [], NAGuidance.execute(parts[0], 5.0, 0.5, 1.5)[0]
    with pytest.raises(MTEOError, match="^No gradient comes through this model; a node on it"):
        distill_model(patched, *parts[1:], Recipe(), progress=lambda stage, *facts, **more: stages.append(stage))
    assert not stages
