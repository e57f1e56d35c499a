"""A batch's gradient in less memory is the gradient of the whole batch."""
import math
from functools import partial

import pytest
import torch

from mteo.distill import picture_loss
from mteo.errors import MTEOError
from mteo.gradient import Room, gradient_of
from mteo.tableau import euler_tableau, execute
from mteo.teacher import Trajectories

TABLEAU = euler_tableau(torch.tensor([8.0, 2.0, 0.5, 0.0]))


def batch_of(count: int) -> Trajectories:
    start, end = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Trajectories(8 * start, start[:, :0], end, torch.arange(count), torch.ones(count, dtype=torch.float64))


FULL = torch.cuda.OutOfMemoryError("full")


def gradient(room: Room, most: int = 1000, count: int = 10, error: RuntimeError = FULL):
    """(loss, gradients, the sizes that were evaluated) of a network with two numbers on a card that holds `most` pictures with their evaluations, and ten times
    as many without; `error` says that it is full."""
    parameters, batch, sizes = [torch.tensor([0.3], requires_grad=True), torch.tensor([0.1], requires_grad=True)], batch_of(count), []

    def denoise(x, call, sigma, batch):
        sizes.append(len(x))
        if len(x) > most:
            raise error
        return torch.tanh(parameters[0] * x / (1 + sigma**2) ** 0.5 + parameters[1] * (call + 1)) * batch.item.view(-1, 1, 1, 1)

    def loss_of(rows, denoise):
        part = batch.part(rows)
        return picture_loss(execute(TABLEAU, partial(denoise, batch=part), part.start), part.end)

    return *gradient_of(loss_of, denoise, batch, parameters, room), sizes


def test_fewer_pictures_at_a_time_and_evaluations_made_twice_give_the_same_gradient():
    loss, whole, _ = gradient(Room(10))
    for room in (Room(3), Room(1), Room(10, recompute=True), Room(4, recompute=True)):
        own, parts, sizes = gradient(room)
        assert max(sizes) == min(room.together, 10) and len(sizes) == 3 * -(-10 // room.together) * (1 + room.recompute)
        assert own.allclose(loss, rtol=1e-5) and all(a.allclose(b, rtol=1e-4) for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize("error", [FULL, *map(RuntimeError, ("MPS backend out of memory (8 GB)", "There is not enough GPU video memory available!"))])
def test_a_full_card_is_given_less_and_stays_so(error):
    room = Room(10)
    _, parts, sizes = gradient(room, most=3, error=error)
    assert room == Room(3) and sizes[0] == 10 and all(a.allclose(b, rtol=1e-4) for a, b in zip(parts, gradient(Room(10))[1], strict=True))
    assert max(gradient(room, most=3)[2]) == 3, "not tried anew at each step"
    with pytest.raises(MTEOError, match="smaller latent"):
        gradient(room, most=0, error=error)
    with pytest.raises(RuntimeError, match="another fault"):
        gradient(Room(10), most=3, error=RuntimeError("another fault"))
    assert room == Room(1, recompute=True)


def test_a_card_too_small_for_one_gradient_is_told_before_the_teachers_work(parts):
    """And what else ComfyUI has on it, such as the text encoder, is taken off first."""
    import comfy.model_management as management

    from mteo.comfyui.training import distill_model
    from mteo.recipe import Recipe
    from reference.objects import make_clip

    model, *rest = parts
    clip, stages = make_clip("unet").patcher, []
    management.load_models_gpu([clip])

    def small(executor, *arguments, **options):
        assert not any(loaded.model is clip for loaded in management.current_loaded_models)
        if torch.is_grad_enabled():
            raise FULL
        return executor(*arguments, **options)

    narrow = model.clone()
    narrow.add_wrapper_with_key("diffusion_model", "small", small)
    assert any(loaded.model is clip for loaded in management.current_loaded_models)
    with pytest.raises(MTEOError, match="smaller latent"):
        distill_model(narrow, *rest, Recipe(), progress=lambda stage, *more, **others: stages.append(stage))
    assert not stages


def test_what_float16_cannot_hold_is_scaled_on_its_way():
    """A mean over many numbers has gradients that float16 rounds to 0; the same network in float32 is what is wanted."""
    batch, found = batch_of(10), []
    for dtype in (torch.float32, torch.float16):
        value = torch.tensor(0.3, requires_grad=True)

        def loss_of(rows, denoise, value=value, dtype=dtype):
            end = 1e-4 * (value.to(dtype) * batch.start[rows].to(dtype)).float()  # the part in float16 gets a 10,000th of the end's gradient
            return picture_loss(end, batch.end[rows])

        loss, (slope,) = gradient_of(loss_of, None, batch, [value], Room(10))
        found.append(float(slope))
    assert found[1] == pytest.approx(found[0], rel=0.01) and found[0] != 0


def test_what_is_too_large_for_float16_is_made_smaller_and_stays_so():
    """A sum over many tokens passes 65,504 on its way; where the loss itself is no number, nothing helps."""
    batch, found, room, tries = batch_of(10), [], Room(10), []
    for dtype in (torch.float32, torch.float16, torch.float16):
        value = torch.tensor(0.3, requires_grad=True)

        def loss_of(rows, denoise, value=value, dtype=dtype):
            tries.append(dtype)
            return picture_loss(1e4 * (value.to(dtype) * batch.start[rows].to(dtype)).float(), batch.end[rows])

        found.append(float(gradient_of(loss_of, None, batch, [value], room)[1][0]))
    assert found[1:] == pytest.approx(found[:1] * 2, rel=0.01) and room.scale < 1
    assert tries.count(torch.float32) == 1 and tries[-2] == torch.float16 and len(tries) == 3 - math.log(room.scale, 16)
    before, nothing = room.scale, torch.tensor(torch.nan, requires_grad=True)
    gradient_of(lambda rows, denoise: picture_loss(nothing * batch.start[rows], batch.end[rows]), None, batch, [nothing], room)
    assert room.scale == before
    edge = torch.tensor(0.0, requires_grad=True)
    loss, (slope,) = gradient_of(lambda rows, denoise: picture_loss(batch.start[rows] * (0 * edge).sqrt(), batch.end[rows]), None, batch, [edge], room)
    assert loss.isfinite() and slope.isnan() and room.scale == before, "one such step does not make all later gradients too small"


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_the_reference_networks_evaluations_can_be_made_twice(kind, comfyui_root):
    """With a table whose offsets are learned: the hooks act in both passes, and so does the patch that chooses the row."""
    from bench.parts import parts, teacher_pairs, untrained
    from mteo.comfyui.training import denoise_of
    from mteo.recipe import Recipe

    own, found = parts(1, 2, False, kind), []
    pairs = teacher_pairs(own, 2, 4.0, 1, 4)

    def work(session):
        patch = session.patch
        patch.at(4.0)
        patch.offsets.replace({path: (rows + 0.05).requires_grad_(True) for path, rows in patch.offsets.table.items()})

        def loss_of(rows, denoise):
            part = pairs.part(rows)
            return picture_loss(execute(TABLEAU, partial(denoise, batch=part), part.start), part.end)

        for recompute in (False, True):
            found.append(gradient_of(loss_of, denoise_of(session), pairs, list(patch.offsets.table.values()), Room(2, recompute))[1])

    own.session(work, untrained(own, Recipe(), TABLEAU))
    assert all(a.allclose(b, atol=1e-6 + 1e-3 * float(a.abs().max())) for a, b in zip(*found, strict=True)) and max(float(a.abs().max()) for a in found[0]) > 0


def test_the_teacher_takes_fewer_pictures_where_the_card_is_full(comfyui_root):
    from bench.parts import parts, untrained
    from mteo.recipe import Recipe

    own, sizes, near = parts(1, 5, False), [], lambda few, whole: few.allclose(whole, atol=0.05 * float(whole.abs().max()))

    def pairs(most):
        def work(session):
            wrap = session._wrap

            def full(x, sigma, **extra):
                sizes.append(len(x))
                answer = wrap(x, sigma, **extra)
                if len(x) > most:  # at its end, when all blocks have put something out
                    raise torch.cuda.OutOfMemoryError("full")
                return answer

            session._wrap = full
            x, noise = torch.randn(2, 5, *session.latent.shape[1:], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                answer = session.denoise(x, 1.0, torch.arange(5), torch.ones(5, dtype=torch.float64))
                session._together = 5
                return answer, session.perceived(x, noise, torch.arange(5))

        return own.session(work, untrained(own, Recipe(), TABLEAU))

    (whole, seen), (few, parts_seen) = pairs(5), pairs(2)
    assert sizes == [5, 5, *[5, 2, 2, 1] * 2] and near(few, whole)
    assert len(seen) == len(parts_seen) == 12 and all(near(a, b) for a, b in zip(parts_seen, seen, strict=True))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pairs(0)


def test_a_gradient_that_is_not_finite_moves_nothing():
    """One picture of one batch would otherwise ruin every offset."""
    from mteo.distill import fresh_state, step_adam
    from mteo.recipe import Recipe

    recipe, parameters = Recipe(iterations=2, batch=1), {"a": torch.zeros(1, 2, requires_grad=True), "b": torch.zeros(1, 3, requires_grad=True)}
    state = fresh_state(parameters, recipe)
    state.rates = dict.fromkeys(parameters, 0.1)
    step_adam(parameters, [torch.tensor([[1.0, float("nan")]]), torch.full((1, 3), float("inf"))], state, recipe, 2)
    assert parameters["a"].tolist() == [[pytest.approx(-0.1), 0.0]] and not parameters["b"].any()
