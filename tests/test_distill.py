"""Distillation inside ComfyUI's sampling, on the reference model."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mteo.recipe import Recipe

RECIPE = Recipe(grid="sgm_uniform", rows="last", iterations=20, batch=12, validate_every=10, pictures=64, held_out=32, teacher_steps=8, guidance=(1.0, 4.0))


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def distilled(parts, tmp_path_factory):
    from mteo.comfyui.training import distill_model

    folder = tmp_path_factory.mktemp("run") / "whole"
    model = parts[0]
    weights = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}
    with torch.inference_mode():
        return folder, weights, distill_model(*parts, RECIPE, folder)


def test_a_short_distillation_lowers_the_held_out_error(distilled):
    for cfg in RECIPE.guidance:
        log = [line for line in distilled[2].log if line["cfg"] == cfg]
        # .79 and .77 in float32, .80 and .77 where the processor multiplies bfloat16
        assert [line["iteration"] for line in log] == [0, 10, 20] and log[-1]["best"] < 0.85 * log[0]["held_out"]


def test_a_network_that_bears_small_steps_only_gets_them(transformer_parts, monkeypatch):
    """The transformer at the default rate: its error falls, and rises where nothing holds the rate back."""
    from mteo import distill
    from mteo.comfyui.training import distill_model

    short, ends = replace(RECIPE, guidance=(1.0,), iterations=20), {}
    for reach in (distill.REACH, float("inf")):
        monkeypatch.setattr(distill, "REACH", reach)
        with torch.inference_mode():
            log = distill_model(*transformer_parts, short).log
        ends[reach] = log[-1]["held_out"] / log[0]["held_out"]
    held, free = ends.values()
    assert held < 0.9 < 1 < free


def test_what_the_network_sees_counts_in_the_second_half_where_there_is_guidance(distilled, parts):
    """Against the same training that only measures it: more alike. Without guidance it is not asked."""
    from mteo.comfyui.training import distill_model

    assert all(line["unlike"] is None for line in distilled[2].log if line["cfg"] == 1.0)
    longer = replace(RECIPE, guidance=(4.0,), iterations=30, validate_every=15)
    with torch.inference_mode():
        measured, told = (distill_model(*parts, replace(longer, perception=weight)).log for weight in (1e-9, longer.perception))
    assert all(measured[i][name] == told[i][name] for i in (0, 1) for name in ("held_out", "unlike")), "the first half is the same"
    assert told[2]["unlike"] < 0.97 * measured[2]["unlike"] < 0.97 * told[0]["unlike"]


def test_the_best_table_is_one_that_the_networks_view_has_trained(parts, monkeypatch):
    """Even where one from before has the better score, as at a rate that leads astray."""
    from mteo import distill
    from mteo.comfyui.training import distill_model

    monkeypatch.setattr(distill, "REACH", float("inf"))
    recipe = replace(RECIPE, guidance=(4.0,), iterations=4, validate_every=1, rate=0.5)
    with torch.inference_mode():
        log = distill_model(*parts, recipe).log
    score = lambda line: line["mean"] + recipe.perception * line["unlike"]
    before, after = log[:3], log[3:]
    assert min(map(score, before)) < min(map(score, after)), "or nothing is tested"
    assert before[-1]["best"] == min(before, key=score)["held_out"] and after[-1]["best"] == min(after, key=score)["held_out"]


def test_the_plain_network_looks_at_pictures_whatever_table_is_on_it(parts):
    """Equal pictures are alike, a blurred one is not; a table on the model changes nothing, and no hook stays."""
    from mteo.comfyui.session import private_copy, run_session, training_mode
    from mteo.comfyui.training import untrained_table, with_table
    from mteo.embeddings import Embeddings
    from mteo.perception import NOISE, unlikeness
    from mteo.tableau import euler_tableau

    model, positives, negative, latent = parts
    sigmas, seen = torch.tensor([14.6, NOISE, 0.5, 0.0]), {}

    def look(session):
        for rows in session.patch.offsets.table.values():
            rows.fill_(strength)
        x = torch.randn(6, 32, 8, 8, generator=torch.Generator().manual_seed(1))
        noise, item = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 2
        blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
        answer = session.denoise(x, NOISE, item, torch.ones(6, dtype=torch.float64))
        looked = session.perceived(x, noise, item), session.perceived(blurred, noise, item)
        assert torch.equal(answer, session.denoise(x, NOISE, item, torch.ones(6, dtype=torch.float64))), "the table acts as before"
        return answer, *looked

    with training_mode():
        private = private_copy(model)
        table = untrained_table(private.model.diffusion_model, private.get_model_object("model_sampling"), "gains", sigmas, "euler", euler_tableau(sigmas))
        for strength in (0.0, 1.0):
            patched, _ = with_table(private, Embeddings({3: table}, "gains"))
            seen[strength] = run_session(patched, positives, negative, latent, look)
    (plain, whole, blurred), (told, same, _) = seen[0.0], seen[1.0]
    assert not torch.equal(plain, told), "the table is on the model"
    assert len(whole) == 12 and all(torch.equal(a, b) for a, b in zip(whole, same, strict=True))
    assert unlikeness(whole, same).abs() < 1e-5 < 0.01 < unlikeness(blurred, whole) < 1
    assert not any(module._forward_hooks for module in private.model.diffusion_model.modules())


def test_the_previews_show_that_it_is_nearer_to_the_teacher(distilled):
    teacher, plain, mteo = (distilled[2].previews[name] for name in ("teacher", "plain", "mteo"))
    assert teacher.shape == (4, 32, 8, 8)
    assert (mteo - teacher).square().mean() < (plain - teacher).square().mean()


def test_the_users_model_is_as_it_was(distilled, parts):
    network = parts[0].model.diffusion_model
    assert all(torch.equal(value, distilled[1][name]) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_training_starts_from_what_the_sampler_gets(parts):
    """x_T of a session is bit for bit that of a sampling with the same noise [9]."""
    import comfy.sample
    import comfy.samplers

    from mteo.comfyui.session import private_copy, run_session, training_mode

    model, positives, negative, latent = parts
    noise, seen = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(3)), []
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "sgm_uniform", 3)

        def listen(sampled, x, sigmas, **options):
            seen.append(x.clone())
            return x

        comfy.sample.sample_custom(model, noise, 1.0, comfy.samplers.KSAMPLER(listen), sigmas, positives[0], negative, latent, disable_pbar=True, seed=0)
    with training_mode():
        start = run_session(private_copy(model), positives, negative, latent, lambda session: session.start(noise, sigmas[0]))
    assert torch.equal(start, seen[0])


def test_killed_and_resumed_gives_the_same_bytes(distilled, parts, tmp_path):
    from mteo.comfyui.training import distill_model

    def stop_at(stage_wanted, done_wanted):
        def progress(stage, done, total, **facts):
            if stage == stage_wanted and done >= done_wanted:
                raise Stop

        return progress

    folder = tmp_path / "resumed"
    with torch.inference_mode():
        for moment in (("teacher, held out", 0), ("training", 12)):
            with pytest.raises(Stop):
                distill_model(*parts, RECIPE, folder, progress=stop_at(*moment))
        assert not (folder / "table.safetensors").exists() and (folder / "state-0.pt").exists()
        went_on = []
        distill_model(*parts, RECIPE, folder, progress=lambda stage, done, total, **facts: went_on.append(done) if stage == "training" else None)
        assert went_on[0] == 11, "the state after the validation at 10 was not read"
    assert (folder / "table.safetensors").read_bytes() == (distilled[0] / "table.safetensors").read_bytes()


def test_a_folder_of_another_run_is_refused(distilled, parts):
    from mteo.comfyui.training import distill_model
    from mteo.errors import MTEOError

    with torch.inference_mode(), pytest.raises(MTEOError, match="belongs to a run with another recipe"):
        distill_model(*parts, Recipe(seed=1), distilled[0])


def test_a_run_folder_belongs_to_the_very_model(parts):
    """Not to one with another attention weight, other options or another prediction, of which the table's fingerprint knows nothing; a table on it is none."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, RescaleCFG

    from mteo.comfyui.patch import apply_embeddings
    from mteo.comfyui.training import facts_of
    from mteo.embeddings import load_embeddings
    from reference.objects import make_model

    model, *rest = parts
    facts = lambda own: json.dumps(facts_of(own, *rest, RECIPE), sort_keys=True)
    with torch.inference_mode():
        merged = make_model(disable_dynamic=True)
        attention = next(path for path, _ in merged.model.diffusion_model.named_parameters() if path.endswith("attn2.to_q.weight"))
        merged.model.diffusion_model.get_parameter(attention).mul_(1.1)
        rescaled = [RescaleCFG().patch(model, share)[0] for share in (0.5, 0.7, 0.7)]
        others = [merged, *rescaled[:2], ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]]
        seen = [facts(own) for own in (model, *others)]
        assert len(set(seen)) == 5
        assert facts(rescaled[2]) == seen[3] and facts(make_model()) == seen[0]
        table = load_embeddings(Path(__file__).parent.parent / "reference" / "tables" / "reference-3steps.safetensors")
        assert facts(apply_embeddings(model, table)[0]) == seen[0]


@pytest.mark.parametrize("way", ["compiled", "EasyCache", "LazyCache"])
def test_a_model_made_quicker_is_distilled_as_the_model_is(parts, way):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    from mteo.comfyui.training import distill_model
    from mteo.recipe import Recipe

    model, *rest = parts
    recipe = Recipe(grid="karras", pictures=4, held_out=2, teacher_steps=4, iterations=1, batch=4, validate_every=1)
    with torch.inference_mode():
        if way == "compiled":
            quicker = model.clone()
            set_torch_compile_wrapper(model=quicker, backend="eager")
        else:
            quicker = {"EasyCache": EasyCacheNode, "LazyCache": LazyCacheNode}[way].execute(model, 3.0, 0.0, 1.0, False)[0]
        before = {kind: list(wrappers) for kind, wrappers in quicker.wrappers.items()}
        own, plain = (distill_model(one, *rest, recipe).embeddings.tables[3] for one in (quicker, model))
    assert all(torch.equal(rows, plain.offsets[site]) for site, rows in own.offsets.items()) and any(rows.any() for rows in own.offsets.values())
    assert {kind: list(wrappers) for kind, wrappers in quicker.wrappers.items()} == before != {}
    assert ("torch_compile_kwargs" in quicker.model_options) == (way == "compiled")


def test_a_damaged_store_is_made_anew(tmp_path):
    """A chunk that a power cut left empty."""
    from mteo.teacher import Trajectories, load_trajectories, save_trajectories

    x, whole = torch.randn(2, 1, 4, 4), tmp_path / "whole.safetensors"
    save_trajectories(Trajectories(x, x[:, None][:, :0], x.clone(), torch.arange(2), torch.ones(2, dtype=torch.float64)), whole, "a run")
    assert load_trajectories(whole, "a run").end.equal(x) and load_trajectories(whole, "another run") is None
    whole.write_bytes(b"")
    assert load_trajectories(whole, "a run") is None


def test_a_model_that_gives_no_finite_picture_is_refused(parts):
    from mteo.comfyui.training import distill_model
    from mteo.errors import MTEOError

    model, (positive, *_), *rest = parts
    broken = [[positive[0][0] * float("nan"), *positive[0][1:]]]
    with torch.inference_mode(), pytest.raises(MTEOError, match="own pictures hold values that are not finite"):
        distill_model(model, [broken], *rest, RECIPE)


def test_the_file_is_small_and_says_how_it_was_made(distilled):
    from safetensors import safe_open

    from mteo.embeddings import load_embeddings

    path = distilled[0] / "table.safetensors"
    table, kept = load_embeddings(path).tables[3], distilled[2].embeddings.tables[3]
    assert path.stat().st_size <= 200_000 and table.guidance == [1.0, 4.0]
    assert all(torch.equal(rows, kept.offsets[site]) for site, rows in table.offsets.items()), "what is given is what the file holds"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["mteo.tables"])
    assert about["3"]["record"]["recipe"]["guidance"] == [1.0, 4.0]


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(steps=1), dict(rows="most"), dict(rate="fast"), dict(pictures=2.5)),
        *(dict(guidance=cfg) for cfg in ((), "1 4", (1, 1), (-1,), (math.nan,), (math.inf,))),
    ],
)
def test_a_wrong_recipe_gets_one_sentence_with_the_name_of_what_is_wrong(wrong):
    from mteo.errors import MTEOError

    with pytest.raises(MTEOError, match=f"^{next(iter(wrong))} is "):
        Recipe(**wrong)
    with pytest.raises(MTEOError, match="no setting 'stepps'"):
        Recipe.of({"stepps": 3})
    assert isinstance(Recipe(pictures=1e3).pictures, int), "as --pictures 1e3 gives it"


def test_an_unknown_solver_is_refused_before_the_search(parts):
    from mteo.comfyui.training import distill_model
    from mteo.errors import MTEOError

    with torch.inference_mode(), pytest.raises(MTEOError, match="^The sampler eulre is not known to ComfyUI"):
        distill_model(*parts, replace(RECIPE, solver="eulre"))


def test_a_searched_grid_with_all_rows_trains_too(parts, tmp_path):
    """σ and coefficients of each cfg value from the start on, told in falling order; the schedule between them."""
    from mteo.comfyui.training import distill_model
    from mteo.embeddings import load_embeddings

    largest = 2**62  # the node's largest seed
    recipe = Recipe(iterations=4, batch=8, validate_every=4, pictures=16, held_out=16, teacher_steps=6, guidance=(4.0, 1.0), seed=largest)
    with torch.inference_mode():
        table = distill_model(*parts, recipe, tmp_path / "run").embeddings.tables[3]
    start = load_embeddings(tmp_path / "run" / "start.safetensors").tables[3]
    assert start.guidance == table.guidance == [1.0, 4.0] and not torch.allclose(start.learned[0].matrix, start.learned[1].matrix, rtol=1e-2)
    assert table.sigmas == start.sigmas and table.sigmas[0] > table.sigmas[1] > table.sigmas[2] > table.sigmas[3] == 0
    assert table.sigmas[0] > table.tableau.sigmas[0] > table.sigmas[1], "the first call is told less than sigma_max"
    for own, found in zip(table.learned, start.learned, strict=True):
        assert own.sigmas.tolist() == found.sigmas.tolist() == sorted(found.sigmas.tolist(), reverse=True)
        assert float(own.start_sigma) == pytest.approx(table.sigmas[0], rel=1e-6)
        assert not torch.equal(own.matrix[-2], found.matrix[-2])
        assert own.matrix[1, 2:].abs().max() == 0, "a call must not read what comes after it"


def test_with_four_steps_the_sigmas_are_learned_too(parts, tmp_path):
    """Each cfg value's for itself; a sampling tells them, and the rows of the table act there. Nearer than from the same start with its σ held."""
    from mteo import coefficients, distill
    from mteo.comfyui.training import distill_model
    from mteo.embeddings import load_embeddings

    recipe = Recipe(steps=4, iterations=12, batch=8, validate_every=6, pictures=32, held_out=32, teacher_steps=8, guidance=(1.0, 4.0), perception=0.0)
    with torch.inference_mode():
        made = distill_model(*parts, recipe, tmp_path / "run")
    start, table = load_embeddings(tmp_path / "run" / "start.safetensors").tables[4], load_embeddings(tmp_path / "run" / "table.safetensors").tables[4]
    for own, found in zip(table.learned, start.learned, strict=True):
        assert own.sigmas.tolist() == own.row_sigmas.tolist() == sorted(own.sigmas.tolist(), reverse=True)
        assert (own.sigmas / found.sigmas).log().abs().max() > 0.1
    last = lambda log: {line["cfg"]: line["best"] for line in log}
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "learned_of", lambda *facts: {coefficients.ROWS: coefficients.learned_of(*facts)[coefficients.ROWS]})
        held = distill_model(*parts, recipe, None)
    learned, fixed = last(made.log), last(held.log)
    assert all(learned[cfg] < fixed[cfg] for cfg in recipe.guidance)


def test_a_diagnosis_of_too_few_pictures_is_refused(parts):
    from mteo.comfyui.diagnosis import diagnose_model
    from mteo.errors import MTEOError

    with pytest.raises(MTEOError, match="^trajectories is 3: give 4 or more"):
        diagnose_model(*parts, Recipe(), pictures=3)


def test_a_searched_grid_without_rows_is_for_any_sampler(parts):
    """Then the first call is at sigma_max, where every sampler begins."""
    from mteo.comfyui.training import distill_model

    with torch.inference_mode():
        table = distill_model(
            *parts, Recipe(rows="solver", iterations=2, batch=8, validate_every=2, pictures=16, held_out=16, teacher_steps=6)
        ).embeddings.tables[3]
    assert table.learned is None and table.tableau.sigmas.tolist() == pytest.approx(table.sigmas[:-1])


def test_a_sampler_with_a_function_among_its_options_can_be_the_student(parts, tmp_path):
    """The file says of it that it is one."""
    from comfy_extras.nodes_custom_sampler import SamplerER_SDE

    from mteo.comfyui.training import distill_model
    from mteo.embeddings import load_embeddings

    short = replace(RECIPE, guidance=(1.0,), iterations=1, batch=4, pictures=4, held_out=4, teacher_steps=4)
    with torch.inference_mode():
        sampler = SamplerER_SDE.execute(solver_type="ODE", max_stage=3, eta=0.0, s_noise=0.0).args[0]
        distill_model(*parts, short, tmp_path / "run", sampler)
    table = load_embeddings(tmp_path / "run" / "table.safetensors").tables[3]
    assert table.solver == "er_sde" and table.solver_options["noise_scaler"] == "function"


def test_a_model_without_a_factory_is_copied_for_training(parts):
    """As GGUF's, and all of ComfyUI 0.3.75: gradients flow in the copy, the original keeps its own tensors."""
    import comfy.model_management

    from mteo.comfyui.session import private_copy, training_mode
    from reference.objects import make_model

    with torch.inference_mode():
        model = make_model(disable_dynamic=True)
    model.cached_patcher_init = None
    with training_mode():
        private = private_copy(model)
        weight, own = (patcher.model.diffusion_model.middle_block[0].emb_layers[1].weight for patcher in (private, model))
        assert weight.data_ptr() != own.data_ptr() and torch.equal(weight, own) and not weight.is_inference()
        x = torch.ones(1, weight.shape[1], requires_grad=True)
        assert torch.autograd.grad((x @ weight.T).sum(), x)[0].abs().sum() > 0
    with torch.inference_mode():
        before, lora = own.clone(), model.clone()
        lora.add_patches({"diffusion_model.middle_block.0.emb_layers.1.weight": (torch.ones_like(own),)}, 1.0)
        comfy.model_management.load_models_gpu([lora])
        assert torch.allclose(model.model.diffusion_model.middle_block[0].emb_layers[1].weight, before + 1), "it is merged into the weights that are copied"
    with training_mode():
        private = private_copy(lora)
        assert torch.equal(private.model.diffusion_model.middle_block[0].emb_layers[1].weight, before), "else it would act twice"


def test_a_lora_in_bypass_mode_is_refused(parts):
    from mteo.comfyui.training import distill_model
    from mteo.errors import MTEOError

    model, *rest = parts
    with torch.inference_mode():
        hooked = model.clone()
        hooked.set_injections("bypass_lora", [])
        with pytest.raises(MTEOError, match="LoRA in bypass mode"):
            distill_model(hooked, *rest, RECIPE)
