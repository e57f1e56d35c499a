"""What a distillation is made of, part by part: the pairs, the prompts, the choice, the solver, and the process around it."""
from dataclasses import replace

import pytest
import torch

from mteo.recipe import Recipe

from .test_graphs import table_of

SHORT = Recipe(grid="sgm_uniform", rows="last", iterations=1, batch=4, validate_every=1, pictures=4, held_out=4, teacher_steps=4)


def inside(parts, work, positives: list | None = None):
    """work(session) on a private copy of the model."""
    from mteo.comfyui.session import private_copy, run_session, training_mode

    model, known, negative, empty = parts
    with training_mode():
        return run_session(private_copy(model), positives or known, negative, empty, work)


def test_pairs_take_the_prompts_in_turn_and_each_its_own_noise(parts):
    """Over chunks that are followed together, and over the streams of training and validation."""
    from mteo.comfyui.training import CHUNK, TRAIN, VALIDATION, gather, teacher_sigmas, teacher_tableau
    from mteo.gridsearch import no_progress

    count = CHUNK + 8

    def work(session):
        teacher = teacher_tableau(session, teacher_sigmas(session, 2))
        return [gather(session, teacher, None, SHORT, 0, stream, count, 3, None, no_progress).part(slice(None)) for stream in (TRAIN, VALIDATION)]

    train, validation = inside(parts, work, [*parts[1], parts[2]])
    assert train.item.tolist() == [number % 3 for number in range(count)]
    starts = {tuple(start.flatten()[:4].tolist()) for pairs in (train, validation) for start in pairs.start}
    assert len(starts) == 2 * count


def test_a_long_prompt_is_evaluated_beside_short_ones(parts):
    """As ComfyUI does with the prompts of a batch."""
    _, (first, second), *_ = parts
    long = [[torch.cat([text, 0.5 * text], 1), facts] for text, facts in second]
    x, ones, calls = torch.randn(3, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3, dtype=torch.float64), []

    def work(session):
        session.short = False  # bfloat16 rounds repeated tokens in another way
        handle = session.network.register_forward_pre_hook(lambda *told: calls.append(1))
        with torch.no_grad():
            together = session.denoise(x, 4.0, torch.tensor([1, 0, 1]), ones)
            assert len(calls) == 1
            alone = torch.cat([session.denoise(x[i : i + 1], 4.0, torch.tensor([item]), ones[:1]) for i, item in enumerate((1, 0, 1))])
        handle.remove()
        return together, alone

    together, alone = inside(parts, work, [first, long])
    assert together.allclose(alone, atol=1e-4)


UPPER = (torch.arange(64) < 32).float()[None, :, None].expand(1, 64, 64)


@pytest.mark.parametrize("changed", [lambda text, facts: [text.repeat(1, 5, 1), facts], lambda text, facts: [text, dict(facts, mask=UPPER, mask_strength=1.0)]])
def test_prompts_that_do_not_stack_are_answered_each_for_itself(parts, changed):
    """One of five times as many tokens, more than ComfyUI puts in one batch; one for the upper half alone."""
    model, (first, second), *_ = parts
    other = [changed(*entry) for entry in second]
    x, ones = torch.randn(3, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3, dtype=torch.float64)

    def work(session):
        with torch.no_grad():
            together = session.denoise(x, 4.0, torch.tensor([1, 0, 1]), ones)
            return together, torch.cat([session.denoise(x[i : i + 1], 4.0, torch.tensor([item]), ones[:1]) for i, item in enumerate((1, 0, 1))])

    together, alone = inside(parts, work, [first, other])
    assert together.allclose(alone, atol=0.05 * float(alone.std())), "bfloat16 rounds by the batch"


def test_a_processs_other_samplings_are_not_in_training(comfyui_root, monkeypatch):
    import comfy.model_management

    from mteo.comfyui.session import training_mode

    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    with pytest.raises(KeyError), training_mode():
        assert comfy.model_management.in_training and torch.is_grad_enabled() and comfy.model_management.NUM_STREAMS == 0
        raise KeyError
    assert not comfy.model_management.in_training and comfy.model_management.NUM_STREAMS == 2


def test_the_table_that_is_given_is_the_best_one_of_the_validations(parts, monkeypatch):
    """Here the first: each step leads astray."""
    from mteo import distill
    from mteo.comfyui.training import distill_model

    monkeypatch.setattr(distill, "REACH", float("inf"))
    with torch.inference_mode():
        made = distill_model(*parts, replace(SHORT, iterations=2, rate=2.0))
    assert made.log[0]["best"] == made.log[-1]["best"] < made.log[-1]["held_out"]
    assert not any(rows.any() for rows in made.embeddings.tables[3].offsets.values())


def test_a_student_that_gives_no_finite_picture_is_refused(parts, monkeypatch):
    from mteo import distill
    from mteo.comfyui.training import distill_model
    from mteo.errors import MTEOError

    monkeypatch.setattr(distill, "evaluate", lambda *facts: (torch.full((4,), float("nan"), dtype=torch.float64), None))
    with torch.inference_mode(), pytest.raises(MTEOError, match="pictures in few steps hold values that are not finite"):
        distill_model(*parts, SHORT)


def test_a_sampler_with_options_whose_rows_stay_runs_as_it_was_told(parts, no_gradients):
    """lms of order 1 is not the lms of that name."""
    import comfy.samplers

    from mteo.comfyui.sampling import sample_latent
    from mteo.comfyui.training import distill_model

    model, positives, negative, empty = parts
    table = distill_model(*parts, replace(SHORT, rows="solver"), sampler=comfy.samplers.ksampler("lms", {"order": 1})).embeddings
    assert table.tables[3].learned is None and table.tables[3].solver_options == {"order": 1}
    assert sample_latent(model, table, dict(samples=empty), 7, positives[0], negative)["samples"].std() > 0.1


@pytest.mark.parametrize(("kind", "flow"), [("parts", False), ("transformer_parts", True)])
def test_the_training_knows_whether_the_model_is_a_flow(request, comfyui_root, monkeypatch, kind, flow):
    """The σ that it learns are noise ÷ signal in the one and noise in the other."""
    from mteo.comfyui import training

    class Seen(Exception):
        pass

    def seen(*facts):
        raise Seen(facts[-1])

    monkeypatch.setattr(training, "distill", seen)
    with torch.inference_mode(), pytest.raises(Seen) as told:
        training.distill_model(*request.getfixturevalue(kind), replace(SHORT, grid="free", rows="all", steps=4, teacher_steps=4))
    assert told.value.args == (flow,)


@pytest.mark.parametrize(
    ("recipe", "calls", "moves"),
    [
        (dict(steps=4), 4, True),
        (dict(steps=4, sequential=8), 4, False),
        (dict(steps=3, solver="heun"), 5, False),
        (dict(steps=4, rows="last"), 4, False),
        (dict(steps=4, grid="karras"), 4, False),
        (dict(steps=8), 8, False),
    ],
)
def test_the_sigmas_are_learned_where_they_were_searched_for_and_each_step_has_one(recipe, calls, moves):
    from mteo.coefficients import moves_sigmas

    assert moves_sigmas(Recipe(**dict(dict(grid="free", rows="all"), **recipe)), calls) == moves


def test_of_a_transformers_block_the_pictures_part_is_looked_at(transformer_parts):
    """It puts out the text's tokens, too."""
    x = torch.randn(2, *transformer_parts[3].shape[1:], generator=torch.Generator().manual_seed(0))
    seen = inside(transformer_parts, lambda session: session.perceived(x, x, torch.tensor([0, 1])))
    network = transformer_parts[0].model.diffusion_model
    patches = x.shape[-2] * x.shape[-1] // network.patch_size**2
    assert len(seen) == len(network.joint_blocks) and {one.shape[:2] for one in seen} == {(2, patches)} and patches != transformer_parts[1][0][0][0].shape[1]


def test_pictures_are_compared_at_the_largest_cfg_and_plain_ones_know_no_table(parts, no_gradients):
    from mteo.comfyui.training import compare_model

    model, positives, negative, empty = parts
    own, none = table_of(), table_of()
    none.tables[3].offsets = {path: torch.zeros_like(rows) for path, rows in none.tables[3].offsets.items()}
    made = lambda table, *cfg: compare_model(model, table, positives, negative, empty, replace(SHORT, guidance=cfg), 2, 5)
    both, four, bare = made(own, 4.0, 1.0), made(own, 4.0), made(none, 4.0)
    assert all(torch.equal(both[name], four[name]) for name in four)
    assert torch.equal(bare["plain"], four["plain"]) and torch.equal(bare["teacher"], four["teacher"]) and not torch.equal(bare["mteo"], four["mteo"])


def test_a_diagnosis_says_of_a_table_what_it_took_away(parts, no_gradients):
    from mteo.comfyui.diagnosis import diagnose_model
    from mteo.comfyui.training import distill_model

    recipe = replace(SHORT, iterations=30, batch=12, pictures=32, held_out=16, validate_every=15, teacher_steps=6)
    made = distill_model(*parts, recipe)
    [found] = diagnose_model(*parts, recipe, pictures=16, embeddings=made.embeddings)
    first, last, best = (found.errors[name] for name in ("plain euler, sgm_uniform", "with a solved last row", "and the best offsets"))
    assert last < first and found.table < last and found.achieved == pytest.approx(1 - (found.table / last) ** 2)
    assert best == pytest.approx(last * (1 - found.offsets) ** 0.5) and found.table == pytest.approx(made.log[-1]["best"], rel=0.25)
    assert list(found.states) == sorted(found.states, reverse=True) and found.states[0.0] == found.table
