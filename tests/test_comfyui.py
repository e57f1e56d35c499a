"""The adapter inside ComfyUI's real sampling code, on the shipped reference model."""
import gc

import pytest
import torch

SIZE = 64


def objects_of(kind):
    import nodes
    from reference.objects import make_clip, make_model, make_vae

    clip, vae, model = make_clip(kind), make_vae(kind), make_model(kind)
    encode = lambda text: nodes.CLIPTextEncode().encode(clip, text)[0]
    return model, vae, encode("cat and apple"), encode("")


@pytest.fixture(scope="module")
def comfy_objects(comfyui_root):
    with torch.inference_mode():
        yield objects_of("unet")


@pytest.fixture(scope="module")
def flow_objects(comfyui_root):
    with torch.inference_mode():
        yield objects_of("mmdit")


def sample(model, positive, negative, sampler, sigmas, cfg=4.0, batch=1, callback=None):
    import comfy.sample

    ratio = model.model.latent_format.spacial_downscale_ratio
    latent = torch.zeros(batch, model.model.latent_format.latent_channels, SIZE // ratio, SIZE // ratio)
    noise = comfy.sample.prepare_noise(latent, 7)
    return comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent, seed=7, disable_pbar=True, callback=callback)


def grid(model, name="sgm_uniform", steps=3):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps)


def zero_embeddings(model, sampler, sigmas, fill=0.0, space="embedding"):
    from mteo.comfyui.solver import read_tableau
    from mteo.embeddings import Embeddings, Table
    from mteo.sites import find_sites

    sampling = model.get_model_object("model_sampling")
    tableau = read_tableau(sampler, sigmas, sampling)
    rows = len(tableau.row_sigmas)
    offsets = {site.path: torch.full((1, rows, site.width), fill) for site in find_sites(model.model.diffusion_model, space)}
    timesteps = [float(sampling.timestep(sigma.float())) for sigma in tableau.row_sigmas]
    return Embeddings({len(sigmas) - 1: Table(len(sigmas) - 1, sigmas.tolist(), timesteps, "", tableau, [1.0], offsets)}, space)


ODE_SAMPLERS = ["euler", "heun", "dpmpp_2m", "ipndm", "deis", "res_multistep", "uni_pc"]


@pytest.mark.parametrize("objects", ["comfy_objects", "flow_objects"])
@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_the_table_of_a_sampler_is_the_sampler(request, objects, name):
    model, _, positive, negative = request.getfixturevalue(objects)
    import comfy.samplers

    from bench.exactness import recording
    from mteo.comfyui.solver import read_tableau, tableau_sampler
    from mteo.tableau import combine

    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object(name), grid(model)
        kept = sigmas.clone()
        tableau = read_tableau(sampler, sigmas, model.get_model_object("model_sampling"), name)
        assert torch.equal(sigmas, kept)
        listening, seen = recording(sampler)
        own = sample(model, positive, negative, listening, sigmas.clone())
        same = model.model.process_latent_out(combine(tableau.matrix[-1], seen))
        told = sample(model, positive, negative, tableau_sampler(lambda cfg: tableau, sigmas.tolist(), tableau.sigmas.tolist()), sigmas.clone())
        # UniPC sets the caller's last σ to .001, and a flow model's result is then divided by 1 − σ: ComfyUI's own pictures are .1 % brighter there [5]
        brighter = 1e-3 if (name, objects) == ("uni_pc", "flow_objects") else 0.0
        apart = lambda other: (own - other).abs().max() / own.abs().max()
        assert apart(same) < max(brighter, 1e-5)
        assert apart(told) < max(brighter, 5e-5)  # the network enlarges float32's rounding, by how much goes with the processor


def test_a_sampler_that_writes_into_its_sigmas_can_be_queued_again(comfy_objects):
    """UniPC sets the last one to .001; a graph keeps the SIGMAS of Apply MTEO [5]."""
    import comfy.samplers

    from mteo.comfyui.patch import apply_embeddings

    model, _, positive, negative = comfy_objects
    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("uni_pc"), grid(model)
        patched, _ = apply_embeddings(model, zero_embeddings(model, sampler, sigmas, fill=0.1))
        first, again = (sample(patched, positive, negative, sampler, sigmas) for _ in range(2))
        assert torch.equal(first, again) and sigmas[-1] == 0


def test_a_teacher_of_many_steps_is_read(comfy_objects):
    import comfy.samplers

    from mteo.comfyui.solver import read_tableau
    from mteo.schedule import karras

    sampler, sampling = comfy.samplers.sampler_object("dpmpp_2m"), comfy_objects[0].get_model_object("model_sampling")
    assert len(read_tableau(sampler, karras(200, 0.03, 14.6), sampling).sigmas) == 200


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "dpm_adaptive", "dpmpp_2m_cfg_pp", "euler_cfg_pp", "lcm"])
def test_samplers_that_are_no_ode_solvers_are_refused_by_name(comfy_objects, name):
    import comfy.samplers

    from mteo.comfyui.solver import read_tableau
    from mteo.errors import MTEOError

    model, why = comfy_objects[0], ".*post-cfg" if name.endswith("_cfg_pp") else ""
    with torch.inference_mode(), pytest.raises(MTEOError, match=f"The sampler {name} {why}"):
        read_tableau(comfy.samplers.sampler_object(name), grid(model), model.get_model_object("model_sampling"), name)


@pytest.mark.parametrize(
    "objects, space", [("comfy_objects", "embedding"), ("comfy_objects", "gains"), ("flow_objects", "embedding"), ("flow_objects", "modulation")]
)
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_zero_table_and_strength_zero_change_no_bit(request, objects, space, name, cfg, batch):
    model, _, positive, negative = request.getfixturevalue(objects)
    import comfy.samplers

    from mteo.comfyui.patch import apply_embeddings, remove_embeddings

    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object(name), grid(model)
        run = lambda patcher: sample(patcher, positive, negative, sampler, sigmas.clone(), cfg, batch)
        plain = run(model)
        zero, _ = apply_embeddings(model, zero_embeddings(model, sampler, sigmas, space=space))
        assert torch.equal(run(zero), plain)
        filled = zero_embeddings(model, sampler, sigmas, fill=0.3, space=space)
        moved, _ = apply_embeddings(model, filled)
        assert not torch.equal(run(moved), plain)
        off, _ = apply_embeddings(model, filled, strength=0.0)
        assert torch.equal(run(off), plain)
        assert torch.equal(run(remove_embeddings(moved.clone())), plain)
        assert torch.equal(run(model), plain)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.model.diffusion_model.modules())


def test_a_clone_that_dies_in_mid_sampling_takes_no_hook_off(comfy_objects):
    import comfy.samplers

    from mteo.comfyui.patch import apply_embeddings

    model, _, positive, negative = comfy_objects
    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("euler"), grid(model)
        patched, _ = apply_embeddings(model, zero_embeddings(model, sampler, sigmas, fill=0.3))
        whole = sample(patched, positive, negative, sampler, sigmas.clone())

        def drop_a_clone(*arguments):
            clone = patched.clone()
            del clone
            gc.collect()

        assert torch.equal(sample(patched, positive, negative, sampler, sigmas.clone(), callback=drop_a_clone), whole)


def test_the_last_apply_wins(comfy_objects):
    import comfy.samplers

    from mteo.comfyui.patch import apply_embeddings

    model, _, positive, negative = comfy_objects
    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("euler"), grid(model)
        first, _ = apply_embeddings(model, zero_embeddings(model, sampler, grid(model, "karras"), fill=0.3))  # its check would refuse sgm_uniform
        twice, _ = apply_embeddings(first, zero_embeddings(model, sampler, sigmas))
        assert torch.equal(sample(twice, positive, negative, sampler, sigmas.clone()), sample(model, positive, negative, sampler, sigmas.clone()))


def test_another_schedule_or_start_is_refused_and_the_next_run_works(comfy_objects):
    import comfy.samplers

    from mteo.comfyui.patch import apply_embeddings
    from mteo.errors import MTEOError

    model, _, positive, negative = comfy_objects
    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("euler"), grid(model)
        patched, _ = apply_embeddings(model, zero_embeddings(model, sampler, sigmas))
        with pytest.raises(MTEOError, match="schedule"):
            sample(patched, positive, negative, sampler, grid(model, "karras"))
        with pytest.raises(MTEOError, match="start at step 1"):
            sample(patched, positive, negative, sampler, sigmas[1:].clone())
        assert torch.isfinite(sample(patched, positive, negative, sampler, sigmas.clone())).all()


def test_wrong_tables_leave_the_model_as_it_was(comfy_objects):
    import comfy.samplers

    from mteo.comfyui.patch import apply_embeddings
    from mteo.errors import MTEOError

    model, *_ = comfy_objects
    with torch.inference_mode():
        embeddings = zero_embeddings(model, comfy.samplers.sampler_object("euler"), grid(model))
        with pytest.raises(MTEOError, match="no table for 5 steps: they hold 3"):
            apply_embeddings(model, embeddings, steps=5)
        offsets = embeddings.tables[3].offsets
        offsets["middle_block.0.emb_layers.1"] = torch.zeros(1, 3, 7)
        with pytest.raises(MTEOError, match=r"middle_block.0.emb_layers.1 takes 512 numbers, the table has 7"):
            apply_embeddings(model, embeddings)
        offsets["joint_blocks.0.x_block.adaLN_modulation.1"] = offsets.pop("middle_block.0.emb_layers.1")
        with pytest.raises(MTEOError, match="another architecture"):
            apply_embeddings(model, embeddings)


@pytest.mark.parametrize(
    "objects, space, count",
    [("comfy_objects", "embedding", 12), ("comfy_objects", "gains", 39), ("flow_objects", "embedding", 9), ("flow_objects", "modulation", 9)],
)
def test_every_site_of_a_reference_model_is_alive(request, objects, space, count):
    """A bias before a GroupNorm whose groups have one channel would change nothing."""
    model = request.getfixturevalue(objects)[0]
    from mteo.injection import Offsets, attach, detach, find_modules
    from mteo.sites import find_sites

    network, ratio = model.model.diffusion_model, model.model.latent_format.spacial_downscale_ratio
    x, t, context = torch.randn(2, model.model.latent_format.latent_channels, 64 // ratio, 64 // ratio), torch.tensor([500.0, 500.0]), torch.randn(2, 8, 128)
    more = {"y": torch.randn(2, 128)} if objects == "flow_objects" else {}
    with torch.inference_mode():
        plain = network(x, t, context=context, **more)
        sites = find_sites(network, space)
        assert len(sites) == count
        for site in sites:
            offsets = Offsets({site.path: torch.full((1, site.width), 0.5)})
            offsets.select(torch.tensor([0]))
            handles = attach(find_modules(network, offsets.table, space), offsets, space)
            assert (network(x, t, context=context, **more) - plain).abs().max() > 1e-3, site.path
            detach(handles)


def test_picture_survives_the_linear_vae(comfy_objects):
    import nodes

    _, vae, *_ = comfy_objects
    with torch.inference_mode():
        latent = torch.randn(2, 32, 8, 8)
        picture = nodes.VAEDecode().decode(vae, {"samples": latent * 0.05})[0]
        again = nodes.VAEEncode().encode(vae, picture)[0]["samples"]
        assert picture.shape == (2, 64, 64, 3) and torch.allclose(again, latent * 0.05, atol=1e-3)


def test_a_compiled_model_takes_the_table_and_gives_it_back(comfy_objects, monkeypatch):
    """Plain, table, plain, table on one compiled model: each bit for bit as without compiling."""
    import comfy.samplers
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    from mteo.comfyui.patch import KEPT, SEVERAL, apply_embeddings
    from reference.objects import make_model

    _, _, positive, negative = comfy_objects
    with torch.inference_mode():
        model = make_model(disable_dynamic=True)
        sampler, sigmas = comfy.samplers.sampler_object("euler"), grid(model)
        embeddings = zero_embeddings(model, sampler, sigmas, fill=0.3)
        run = lambda patcher: sample(patcher, positive, negative, sampler, sigmas.clone(), 1.0)
        plain, moved = run(model), run(apply_embeddings(model, embeddings)[0])
        other = zero_embeddings(model, sampler, sigmas, fill=0.1)
        others = [(table, strength, run(apply_embeddings(model, table, strength=strength)[0])) for table, strength in ((embeddings, 0.5), (other, 1.0))]
        compiled = model.clone()
        set_torch_compile_wrapper(model=compiled, backend="eager")
        patched = apply_embeddings(compiled, embeddings)[0]
        for patcher, wanted in ((compiled, plain), (patched, moved), (compiled, plain), (patched, moved)):
            assert torch.allclose(run(patcher), wanted, atol=1e-6)
        assert not torch.allclose(plain, moved, atol=1e-2)
        for table, strength, wanted in (*others, (embeddings, 1.0, moved)):
            assert torch.allclose(run(apply_embeddings(compiled, table, strength=strength)[0]), wanted, atol=1e-6)
        with monkeypatch.context() as patching:
            patching.setattr(torch._dynamo, "reset", lambda: pytest.fail("a table that was there must not have the model compiled anew"))
            for table, strength, wanted in ((embeddings, 1.0, moved), *others):
                assert torch.allclose(run(apply_embeddings(compiled, table, strength=strength)[0]), wanted, atol=1e-6)
        weak = run(apply_embeddings(model, other, strength=0.2)[0])
        assert torch.allclose(run(apply_embeddings(compiled, other, strength=0.2)[0]), weak, atol=1e-6)
        assert len(getattr(compiled.model, KEPT)) == SEVERAL and torch.allclose(run(compiled), plain, atol=1e-6)


def test_the_model_as_it_was_after_an_error_in_mid_sampling(comfy_objects):
    import comfy.samplers

    from mteo.comfyui.patch import apply_embeddings

    model, _, positive, negative = comfy_objects
    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("euler"), grid(model)
        plain = sample(model, positive, negative, sampler, sigmas.clone())
        patched, _ = apply_embeddings(model, zero_embeddings(model, sampler, sigmas, fill=0.3))

        def fail(*told):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample(patched, positive, negative, sampler, sigmas.clone(), callback=fail)
        assert patched.get_attachment("mteo").offsets.current is None
        assert torch.equal(sample(model, positive, negative, sampler, sigmas.clone()), plain)


def test_stopping_early_runs_the_first_rows_of_the_table(comfy_objects):
    """A table with learned rows, stopped after two steps, leaves the x of the third call."""
    from mteo.comfyui.sampling import sample_latent
    from mteo.tableau import with_matrix

    model, _, positive, negative = comfy_objects
    with torch.inference_mode():
        import comfy.samplers

        embeddings = zero_embeddings(model, comfy.samplers.sampler_object("euler"), grid(model), fill=0.1)
        table = embeddings.tables[3]
        table.learned = [with_matrix(table.tableau, 1.01 * table.tableau.matrix)]
        latent = {"samples": torch.zeros(1, 32, 8, 8), "downscale_ratio_spacial": 8}
        take = lambda **more: sample_latent(model, embeddings, latent, 5, positive, negative, cfg=4.0, **more)["samples"]
        noisy, early, whole = take(end_step=2, return_with_leftover_noise=True), take(end_step=2), take()
        assert noisy.std() > early.std() > 0 and not torch.equal(early, whole)


def test_another_model_sampling_is_refused_by_its_times(comfy_objects):
    import comfy.samplers

    from mteo.comfyui.checks import require_timesteps
    from mteo.errors import MTEOError

    model = comfy_objects[0]
    table = zero_embeddings(model, comfy.samplers.sampler_object("euler"), grid(model)).tables[3]

    class Other:
        def timestep(self, sigma):
            return sigma.log() / 4  # EDM's

    require_timesteps(table, model.get_model_object("model_sampling"))
    with pytest.raises(MTEOError, match="remove the node that changes the model's sampling"):
        require_timesteps(table, Other())


def test_a_sibling_is_taken_with_a_warning_and_another_model_refused(comfy_objects, caplog):
    import comfy.samplers

    from mteo.comfyui.identity import model_fingerprint
    from mteo.comfyui.patch import apply_embeddings
    from mteo.errors import MTEOError

    model = comfy_objects[0]
    embeddings = zero_embeddings(model, comfy.samplers.sampler_object("euler"), grid(model))
    own = model_fingerprint(model, list(embeddings.tables[3].offsets))
    for scale, warned in ((1.0, False), (1.02, False), (1.2, True)):
        caplog.clear()
        embeddings.model["fingerprint"] = {path: [scale * value for value in values] for path, values in own.items()}
        apply_embeddings(model, embeddings)
        assert ("sibling" in caplog.text) == warned
    embeddings.model["fingerprint"] = {path: [-value for value in values] for path, values in own.items()}
    with pytest.raises(MTEOError, match="distilled for another model"):
        apply_embeddings(model, embeddings)


def test_a_table_of_two_cfg_values_gives_each_its_own_and_blends_between(comfy_objects):
    """Offsets, learned rows and the σ of the calls at cfg 1 and 3: at a trained cfg those of it, bit for bit; halfway (of cfg ÷ (1 + cfg)) the mean of both;
    beyond, the end one's."""
    import comfy.samplers

    from mteo.comfyui.sampling import applied
    from mteo.embeddings import Embeddings
    from mteo.tableau import Tableau

    model, _, positive, negative = comfy_objects
    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("euler"), grid(model)
        one, three, mean, both = (zero_embeddings(model, sampler, sigmas) for _ in range(4))
        for own, fill, scale, lower in ((one, 0.1, 1.01, 0.9), (three, 0.3, 1.03, 0.7), (mean, 0.2, 1.02, 0.8)):
            plain = own.tables[3].tableau
            own.tables[3].learned = [Tableau(lower * plain.sigmas, lower * plain.row_sigmas, plain.rows, scale * plain.matrix)]
            own.tables[3].offsets = {path: rows + fill for path, rows in own.tables[3].offsets.items()}
        table = both.tables[3]
        table.guidance, table.learned = [1.0, 3.0], [*one.tables[3].learned, *three.tables[3].learned]
        table.offsets = {path: torch.cat([one.tables[3].offsets[path], three.tables[3].offsets[path]]) for path in table.offsets}

        def take(embeddings: Embeddings, cfg: float):
            patched, own_sampler, own_sigmas = applied(model, embeddings)
            return sample(patched, positive, negative, own_sampler, own_sigmas, cfg)

        for cfg, own in ((1.0, one), (3.0, three), (8.0, three)):
            assert torch.equal(take(both, cfg), take(own, cfg)), cfg
        assert table.tableau_at(3.0, 2.0).sigmas.equal(table.tableau_at(3.0).sigmas), "beyond strength 1 only the offsets grow"
        half = 5 / 3  # cfg ÷ (1 + cfg) is .625 there, between .5 and .75
        assert torch.allclose(take(both, half), take(mean, half), atol=1e-4)
        assert not torch.allclose(take(both, half), take(three, half), atol=1e-2)


def test_a_row_is_found_within_rounding_and_two_close_rows_are_told_apart(comfyui_root):
    from mteo.comfyui.patch import windows

    rows = torch.tensor([1.0, 0.9999, 0.5])
    bounds, row_of = windows(rows)
    asked = torch.tensor([1.0, 1.00001, 0.99998, 0.9999, 0.50003, 0.5001, 0.4998, 2.0, 0.0])
    assert row_of[torch.bucketize(asked, bounds)].tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("kind, sites", [("unet", 12), ("mmdit", 9)])
def test_a_reference_network_of_either_kind_has_its_sites_and_a_gradient(comfyui_root, kind, sites):
    from mteo.sites import find_sites
    from reference.latents import SHAPES
    from reference.train import NOISED, Pair
    from reference.vocabulary import padded

    patch, channels = SHAPES[kind]
    with torch.inference_mode(False):  # the module's fixture may hold it on
        tokens = torch.tensor([padded("cat and apple"), padded("")])
        pair, generator = Pair(kind), torch.Generator().manual_seed(0)
        noisy, t, target, weight = NOISED[kind](torch.randn(2, channels, 64 // patch, 64 // patch, generator=generator), generator)
        answer = pair(noisy, t, tokens)
        assert answer.shape == target.shape and len(find_sites(getattr(pair, kind), "embedding")) == sites
        (weight * (answer - target).square()).mean().backward()
        assert any(value.grad is not None and value.grad.abs().max() > 0 for value in getattr(pair, kind).parameters())


def test_training_with_guidance_inside_comes_to_rest_at_that_cfg(comfyui_root):
    """The answer follows its own target: it then is what guidance made of the network before, and an empty prompt's stays."""
    from reference.train import guided

    truth, without = torch.tensor([2.0, 5.0]).view(2, 1, 1, 1), torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    answer, dropped = truth, torch.tensor([False, True])
    for _ in range(60):
        answer = guided(truth, answer, without, dropped, 1.5)
    assert answer.flatten().tolist() == pytest.approx([1 + 1.5 * (2 - 1), 5.0])


def table_for(model):
    """Embeddings of three steps with gains and offsets, for a solver of their own."""
    import comfy.samplers

    from mteo.tableau import with_matrix

    embeddings = zero_embeddings(model, comfy.samplers.sampler_object("euler"), grid(model), space="gains")
    table, generator = embeddings.tables[3], torch.Generator().manual_seed(0)
    table.offsets = {path: 0.3 * torch.randn(rows.shape, generator=generator) for path, rows in table.offsets.items()}
    table.learned = [with_matrix(table.tableau, table.tableau.matrix * 1.01)]
    return embeddings


def test_a_sampling_with_folded_gains_is_the_one_with_hooks(comfy_objects, monkeypatch):
    """Of the table's own sampler, which tells σ, and on the processor; a LoRA on a normalisation that comes between two samplings acts."""
    import comfy.samplers

    from mteo.comfyui import patch
    from mteo.comfyui.sampling import applied
    from mteo.folding import Folded, foldable

    model, _, positive, negative = comfy_objects
    embeddings, made, used = table_for(model), {}, []
    with torch.inference_mode():
        norms = {name: value for name, value in model.model.diffusion_model.named_parameters() if name.endswith(("norm1.weight", "out_layers.0.bias"))}
        before, row = {name: value.clone() for name, value in norms.items()}, Folded.row
        monkeypatch.setattr(Folded, "row", lambda self, number: used.append(number) or row(self, number))
        for fold in (True, False):
            monkeypatch.setattr(patch, "foldable", foldable if fold else lambda modules: False)
            for strength in (0.0, 0.5):
                lora = model.clone()
                lora.add_patches({f"diffusion_model.{name}": (torch.full_like(value, 0.2),) for name, value in norms.items()}, strength)
                patched, sampler, sigmas = applied(lora, embeddings)
                made[fold, strength] = sample(patched, positive, negative, sampler, sigmas)
            assert (len(used) > 0) == fold
            used.clear()
        for strength in (0.0, 0.5):
            assert made[True, strength].allclose(made[False, strength], atol=2e-3 * float(made[False, strength].abs().max()))
        assert (made[True, 0.0] - made[True, 0.5]).abs().max() > 0.05
        sample(model, positive, negative, comfy.samplers.sampler_object("euler"), sigmas)  # used without it, the model gives the LoRA back
        now = dict(model.model.diffusion_model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in before.items())
