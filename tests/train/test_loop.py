"""The loop: resumption to the bit, accumulation, averages, errors that say what to do."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.system.progress import Progress
from compress.train import TokenSource, TrainingOptions, fit


class Stopped(Exception):
    pass


def stop_before(step: int):
    """A guard that raises when it is called the (step + 1)th time."""
    calls = iter(range(step))

    def guard() -> None:
        if next(calls, None) is None:
            raise Stopped

    return guard


@pytest.fixture
def train(training):
    """``train(**changes)``: the script's training; returns module and result."""

    def run(guard=lambda: None, folder=None, loss=training.noisy_loss, seed=3, **changes):
        options = training.OPTIONS.model_copy(update=changes)
        module = training.make_module()
        result = fit(
            module, loss, training.Points(), options, seed=seed, guard=guard, folder=folder
        )
        return module.state_dict(), result

    return run


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def losses(result) -> list[float]:
    return [line["loss"] for line in result.history]


@pytest.mark.parametrize("step", range(1, 10))
def test_interrupted_anywhere_ends_in_the_same_bytes(step, train, tmp_path):
    undisturbed, whole = train()
    with pytest.raises(Stopped):
        train(guard=stop_before(step), folder=tmp_path)
    (tmp_path / "checkpoint.safetensors.partial").write_bytes(b"half a file")
    resumed, result = train(folder=tmp_path)
    assert same(resumed, undisturbed)
    assert losses(result) == losses(whole)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))


def test_killed_process_ends_in_the_same_bytes(train, launch, training, tmp_path):
    died = launch(tmp_path / "out.pt", tmp_path / "folder", 8)
    assert died.returncode == -signal.SIGKILL, died.stderr
    done = 0

    def count() -> None:
        nonlocal done
        done += 1

    resumed, _ = train(folder=tmp_path / "folder", guard=count)
    assert done == 4  # checkpoints are written behind steps 3 and 6
    assert same(resumed, train()[0])


def test_finished_training_is_not_done_again(train, tmp_path):
    first, _ = train(folder=tmp_path)
    again, result = train(folder=tmp_path, guard=stop_before(0))
    assert same(again, first)
    assert result.steps == len(result.history) == 10


def test_seed_decides(train):
    assert same(train(seed=5)[0], train(seed=5)[0])
    assert not same(train(seed=5)[0], train(seed=6)[0])


def test_gradients_of_the_caller_count_for_nothing(training):
    trained = []
    for stale in (False, True):
        module = training.make_module()
        if stale:
            module(training.Points().values).square().sum().mul(1e3).backward()
        fit(module, training.noisy_loss, training.Points(), training.OPTIONS)
        trained.append(module.state_dict())
    assert same(*trained)


def test_global_random_numbers_are_left_alone(training):
    module = training.make_module()
    torch.manual_seed(0)
    fit(module, training.noisy_loss, training.Points(), training.OPTIONS)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


def test_accumulation_equals_the_large_batch(train):
    def plain(module, batch, _moment):
        return (module[0](batch["x"])[..., :6] - batch["x"]).square().mean(), {}

    small, few = train(loss=plain, micro_batch=2)
    large, one = train(loss=plain, micro_batch=8)
    for name in small:
        assert torch.allclose(small[name], large[name], rtol=1e-4, atol=1e-6), name
    assert losses(few) == pytest.approx(losses(one), rel=1e-5)


def test_each_epoch_sees_every_example_once(training):
    seen = []

    def note(module, batch, _moment):
        seen.append(batch["x"])
        return module[0](batch["x"]).square().mean(), {}

    options = TrainingOptions(steps=21, batch=3, precision="float32")
    fit(training.make_module(), note, training.Points(), options)
    order = torch.cat(seen)
    epochs = order.split(21)
    everything = training.Points().values.flatten(1).sum(1).sort().values
    for epoch in epochs:
        assert torch.equal(epoch.flatten(1).sum(1).sort().values, everything)
    assert not torch.equal(epochs[0], epochs[1])


def test_average_follows_its_definition():
    def trajectory(decay):
        weights = []

        def loss(module, batch, _moment):
            weights.append(module.weight.detach().clone())
            return module(batch["input_ids"].float()).square().mean(), {}

        torch.manual_seed(2)
        module = nn.Linear(3, 1, bias=False)
        options = TrainingOptions(steps=5, batch=1, learning_rate=0.1, ema=decay)
        fit(module, loss, TokenSource(torch.arange(9).view(3, 3)), options)
        return [*weights, module.weight.detach()]

    average, *later = trajectory(None)
    for step, weight in enumerate(later):
        decay = min(0.15, (1 + step) / (10 + step))  # both sides of the minimum occur
        average = decay * average + (1 - decay) * weight
    *path, result = trajectory(0.15)
    assert torch.allclose(result, average, rtol=1e-5)
    assert not torch.allclose(result, later[-1], rtol=1e-3)
    assert torch.equal(path[-1], later[-2])  # training itself does not see the average


@pytest.mark.parametrize("clip", [0.1, None])
def test_clipping_bounds_the_gradient(clip):
    module = nn.Linear(4, 4)
    norms = []
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))

    def loss(module, batch, _moment):
        return 1e3 * module(batch["input_ids"].float()).square().mean(), {}

    options = TrainingOptions(steps=1, batch=2, clip=clip)
    result = fit(module, loss, TokenSource(torch.arange(8).view(2, 4)), options)
    norm = float(torch.stack(norms).norm())
    assert result.history[0].get("norm") == (pytest.approx(norm) if clip else None)


def test_only_what_is_chosen_is_trained(training):
    module = training.make_module()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    groups = [{"params": [module[0].weight], "lr": 1e-1}, {"params": [module[3].bias]}]
    options = TrainingOptions(steps=1, batch=4, learning_rate=1e-3, clip=None)
    fit(module, training.noisy_loss, training.Points(), options, parameters=groups)
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in module.named_parameters()}
    # The first step of Adam moves each entry by the learning rate.
    assert moved["0.weight"] == pytest.approx(1e-1, rel=1e-2)
    assert moved["3.bias"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["0.bias"] == moved["3.weight"] == 0


def test_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(train, training, tmp_path):
    def breaks(module, batch, moment):
        loss, figures = training.noisy_loss(module, batch, moment)
        return loss * (float("nan") if moment.step == 7 else 1), figures

    with pytest.raises(CompressError, match="finite loss at step 7.*Lower learning_rate"):
        train(loss=breaks, folder=tmp_path)
    assert same(train(folder=tmp_path)[0], train()[0])


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_changes_nothing(clip, train, training, tmp_path):
    def breaks(module, batch, moment):
        loss, figures = training.noisy_loss(module, batch, moment)
        if moment.step == 7:  # the square root of 0: a finite value without a finite slope
            loss = loss + (module[0].weight * 0).square().sum().sqrt()
        return loss, figures

    with pytest.raises(CompressError, match="finite norm of the gradient at step 7"):
        train(loss=breaks, folder=tmp_path, clip=clip)
    assert same(train(folder=tmp_path, clip=clip)[0], train(clip=clip)[0])


@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 1.0}, "options.learning_rate: 0.01 then, 1.0 now"),
        ({"micro_batch": 4}, "options.micro_batch: 2 then, 4 now"),
        ({"seed": 9}, "seed: 3 then, 9 now"),
    ],
)
def test_folder_of_another_training_is_refused(change, named, train, tmp_path):
    train(folder=tmp_path)
    with pytest.raises(CompressError, match=named):
        train(folder=tmp_path, **change)


def test_folder_of_other_shapes_or_data_is_refused(train, training, tmp_path):
    train(folder=tmp_path)
    source = training.Points()
    wide = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Dropout(0.2), nn.Linear(13, 6))
    with pytest.raises(CompressError, match="shapes.0.weight"):
        fit(wide, training.noisy_loss, source, training.OPTIONS, seed=3, folder=tmp_path)
    source.values = source.values + 1
    module = training.make_module()
    with pytest.raises(CompressError, match="examples.digest"):
        fit(module, training.noisy_loss, source, training.OPTIONS, seed=3, folder=tmp_path)


def test_damaged_checkpoint_is_refused(train, tmp_path):
    train(folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    flipped = bytes([*whole[:-5], whole[-5] ^ 1, *whole[-4:]])
    for damaged in (whole[:-100], flipped):
        path.write_bytes(damaged)
        with pytest.raises(CompressError, match="whole checkpoint"):
            train(folder=tmp_path)


@pytest.mark.parametrize("lines", [None, 4])
def test_a_history_without_all_steps_is_refused(lines, train, tmp_path):
    train(folder=tmp_path)
    path = tmp_path / "history.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:lines]
    path.write_text("".join(kept)) if lines else path.unlink()
    with pytest.raises(CompressError, match=f"10 steps.* of {lines or 0}.*Remove the folder"):
        train(folder=tmp_path)


def test_nothing_to_train_is_an_error(training):
    module = training.make_module().requires_grad_(False)
    with pytest.raises(CompressError, match="parameters to train"):
        fit(module, training.noisy_loss, training.Points(), training.OPTIONS)


def test_gradient_checkpointing_changes_memory_only(tiny, tokens):
    results = []
    for wanted in (False, True):
        model = tiny("gpt2", resid_pdrop=0.2).train()

        def loss(model, batch, _moment):
            return model(**batch, labels=batch["input_ids"], use_cache=False).loss, {}

        options = TrainingOptions(steps=2, batch=2, gradient_checkpointing=wanted)
        fit(model, loss, TokenSource(tokens), options)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        results.append(model.state_dict())
    assert same(*results)
    module = nn.Linear(2, 2)
    options = TrainingOptions(steps=1, gradient_checkpointing=True)
    with pytest.raises(CompressError, match="supports gradient checkpointing"):
        fit(module, loss, TokenSource(tokens), options)


def test_progress_tells_loss_speed_and_time_left(train, training, capsys):
    module = training.make_module()
    fit(
        module, training.noisy_loss, training.Points(), training.OPTIONS,
        name="masks", progress=Progress(interval=0.0),
    )  # fmt: skip
    told = capsys.readouterr().err
    assert "masks: 10/10, loss " in told
    assert "tokens/s" in told and "s left" in told


def test_two_processes_equal_one_sharded_or_not(train, launch, tmp_path):
    done = launch(tmp_path / "out.pt", tmp_path / "folder", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    together = torch.load(tmp_path / "out.pt", weights_only=True)
    assert together.pop("processes") == 2
    alone, result = train()
    assert together.pop("losses").tolist() == pytest.approx(losses(result), rel=1e-5)
    for name, value in alone.items():
        for copy in (together[name], together[f"sharded.{name}"]):
            assert torch.allclose(copy, value, rtol=1e-4, atol=1e-6), name
