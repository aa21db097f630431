import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tiny import Blocks, Tiny, TinyNetwork, picture
from torch import nn
from torch.utils.data import DataLoader

import seglight
from seglight.models.base import BaseModel
from seglight.models.instance import InstanceModel
from seglight.models.semantic import SemanticModel


def quiet(**options):
    defaults = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(**{**defaults, "accelerator": "cpu", **options})


def test_normalisation_families():
    pixel = torch.tensor([200.0, 100.0, 50.0]).view(1, 3, 1, 1)
    expected = {
        "torch": [(200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (50 / 255 - 0.406) / 0.225],
        "caffe": [50 - 104.00699, 100 - 116.66877, 200 - 122.67892],
        "half": [200 / 127.5 - 1, 100 / 127.5 - 1, 50 / 127.5 - 1],
        "grey": [350 / 3 / 255],
    }
    for family, values in expected.items():
        model = Tiny(num_classes=2, preprocessing=family)
        assert torch.allclose(model.normalize(pixel).flatten(), torch.tensor(values), atol=1e-5), family
        assert torch.equal(model.normalize(pixel.to(torch.uint8)), model.normalize(pixel))


def test_forward_gives_image_size_and_labels_original_sizes():
    model = Tiny(num_classes=4).eval()
    assert model(picture()[None]).shape == (1, 4, 21, 34)
    images = [picture(20, 30), picture(20, 30), picture(33, 17)]
    labels, _ = model.labels(images)
    assert [tuple(map.shape) for map in labels] == [(20, 30), (20, 30), (33, 17)]
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(model(image[None]).argmax(1)[0], label.long())


def test_images_without_labels_are_not_in_the_validation_loss():
    torch.manual_seed(0)
    model, image = Tiny(num_classes=4), picture(16, 16)
    labels, nothing = torch.zeros(16, 16, dtype=torch.uint8), torch.full((16, 16), 255, dtype=torch.uint8)
    losses = []
    for masks in ([labels], [labels, nothing, nothing], [nothing]):
        batches = [{"image": [image], "mask": [mask], "image_id": ["a"]} for mask in masks]
        losses.append(quiet().validate(model, DataLoader(batches, batch_size=None), verbose=False)[0]["val/loss"])
    assert losses[0] == losses[1] > 0 and np.isnan(losses[2])


@pytest.mark.parametrize("training", [True, False])
def test_a_failed_look_leaves_the_mode_as_it_was(training):
    """A Conv2d takes no list of images, an Identity no targets."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    semantic = SemanticModel(network=nn.Conv2d(1, 2, 1), num_classes=2).train(training)
    instance = InstanceModel(network=nn.Identity(), num_classes=2).train(training)
    calls = [lambda: semantic.predict(pixels), lambda: instance.predict(pixels), lambda: instance([picture()])]
    for model, call in zip((semantic, instance, instance), calls, strict=True):
        with pytest.raises((RuntimeError, TypeError)):
            call()
        assert model.training == model.network.training == training


def test_loss_weights_match_outputs_by_name():
    torch.manual_seed(0)
    batch = {
        "image": picture(16, 16)[None],
        "mask": torch.randint(0, 4, (1, 16, 16), dtype=torch.uint8),
        "image_id": ["a"],
    }
    one, two = Tiny(num_classes=4), Tiny(num_classes=4, loss_weights={"out": 1.0, "aux": 0.4})
    two.load_state_dict(one.state_dict())
    outputs = one.network(one.normalize(batch["image"]))
    losses = two.loss(outputs, batch)
    assert set(losses) == {"loss", "loss_out", "loss_aux"}
    assert torch.isclose(losses["loss"], losses["loss_out"] + 0.4 * losses["loss_aux"])
    assert torch.isclose(one.loss(outputs, batch)["loss"], losses["loss_out"])
    with pytest.raises(ValueError, match="aus"):
        Tiny(num_classes=4, loss_weights={"aus": 1.0}).loss(outputs, batch)


def test_parameter_groups_follow_the_caffe_rules():
    model = Tiny(num_classes=2, lr=0.1, head_lr=10, bias_lr=2, decay_bias=False, weight_decay=0.5)
    groups = {(round(g["lr"], 6), g["weight_decay"]): len(g["params"]) for g in model.parameter_groups()}
    assert groups == {(0.1, 0.5): 1, (0.2, 0.0): 1, (1.0, 0.5): 2, (2.0, 0.0): 2}
    assert sum(groups.values()) == len(list(model.network.parameters()))


def test_schedules():
    poly = Tiny(num_classes=2, power=0.9)
    assert [poly.lr_factor(s, 100) for s in (0, 50, 100)] == pytest.approx([1, 0.5**0.9, 0])
    steps = Tiny(num_classes=2, schedule="steps", milestones=[10, 20])
    assert [steps.lr_factor(s, 30) for s in (0, 9, 10, 20)] == pytest.approx([1, 1, 0.1, 0.01])
    warm = Tiny(num_classes=2, schedule="constant", warmup=4)
    assert [warm.lr_factor(s, 30) for s in (0, 3, 9)] == pytest.approx([0.25, 1, 1])
    with pytest.raises(ValueError, match="milestones"):
        Tiny(num_classes=2, schedule="steps")


@pytest.mark.parametrize(
    "bad, word",
    [
        ({"num_classes": 0}, "between 1 and 255"),
        ({"num_classes": 256}, "255"),
        ({"num_classes": 3, "classes": ["a"]}, "one name per class"),
        ({"num_classes": 3, "class_weights": [1.0]}, "one per class"),
        ({"num_classes": 3, "lr": -1.0}, r"lr is -1.0; give a number of at least 0"),
        ({"num_classes": 3, "weight_decay": float("nan")}, r"weight_decay is nan"),
        ({"num_classes": 3, "test_scales": [1.0, 0.0]}, r"test_scales is \[1.0, 0.0\]; give factors above 0"),
        ({"num_classes": 3, "test_window": 0}, "test_window is 0; give a number of pixels"),
        ({"num_classes": 3, "test_long_side": -5}, "test_long_side is -5; give a number of pixels"),
    ],
)
def test_bad_arguments(bad, word):
    with pytest.raises(ValueError, match=word):
        Tiny(**bad)


def test_logged_loss_is_the_mean_since_the_last_log():
    """Against a logger that sees what is logged, and a model that keeps every loss."""

    class Recorder(pl.loggers.Logger):
        name, version, seen = "r", 0, []

        def log_metrics(self, metrics, step=None):
            self.seen.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    losses = []

    class Keeping(Tiny):
        def track(self, values):
            losses.append(values["loss"].item())
            super().track(values)

    recorder = Recorder()
    trainer = quiet(max_steps=12, log_every_n_steps=4, logger=recorder, limit_val_batches=0)
    trainer.fit(Keeping(num_classes=4), datamodule=Blocks())
    logged = {step: m["train/loss"] for step, m in recorder.seen if "train/loss" in m}
    assert list(logged.values()) == pytest.approx([np.mean(losses[i : i + 4]) for i in (0, 4, 8)], rel=1e-5)
    assert next(m["train/lr"] for _, m in recorder.seen if "train/lr" in m) < 0.01


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_batch_norm_keeps_its_statistics_unless_it_trains(mode):
    """Through a fit with validations between, after which Lightning restores the modes that it found."""

    class Normed(SemanticModel):
        def __init__(self, num_classes, **kwargs):
            network = TinyNetwork(num_classes)
            network.backbone = nn.Sequential(network.backbone, nn.BatchNorm2d(4))
            super().__init__(network=network, num_classes=num_classes, **kwargs)

    model = Normed(num_classes=4, batch_norm=mode)
    before = {name: value.clone() for name, value in model.network.backbone[1].state_dict().items()}
    quiet(max_steps=4, val_check_interval=2, check_val_every_n_epoch=None).fit(model, datamodule=Blocks())
    after = model.network.backbone[1].state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    statistics, affine = {"running_mean", "running_var", "num_batches_tracked"}, {"weight", "bias"}
    assert moved == {"train": statistics | affine, "eval": affine, "frozen": set()}[mode]


def test_training_reduces_the_loss_and_scores_are_complete():
    data = Blocks()
    model = Tiny(num_classes=4, classes=list(data.classes), width=16, optimizer="adamw", lr=0.02)
    trainer = quiet(max_steps=300)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)
    metrics = trainer.callback_metrics
    assert metrics["test/mIoU"] > 0.7
    assert "test_class/never" not in metrics and "test_class/dark" in metrics
    assert model.scores.table.sum() == sum((m != 255).sum() for _, m in map(data.split("test").read, range(5)))


def test_scores_do_not_depend_on_the_batch_size():
    model = Tiny(num_classes=4)
    tables = []
    for size in (1, 2, 5):
        quiet().validate(model, datamodule=Blocks(val_batch_size=size), verbose=False)
        tables.append(model.scores.table)
    assert all(torch.equal(torch.as_tensor(t), torch.as_tensor(tables[0])) for t in tables)


def test_checkpoint_rebuilds_the_model_alone(tmp_path):
    model = Tiny(num_classes=4, width=6, lr=0.3, classes=["a", "b", "c", "d"])
    trainer = quiet(max_steps=1, limit_val_batches=0)
    trainer.fit(model, datamodule=Blocks())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    torch.load(tmp_path / "m.ckpt", weights_only=True)
    again = seglight.load(tmp_path / "m.ckpt")
    assert type(again) is Tiny and again.classes == ["a", "b", "c", "d"] and again.lr == 0.3
    image = picture()[None]
    assert torch.equal(again(image), model.eval()(image))
    assert seglight.load(tmp_path / "m.ckpt", test_flip=True).test_flip


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    trainer = quiet(max_steps=1, limit_val_batches=0)
    trainer.fit(Tiny(num_classes=4), datamodule=Blocks())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"width=4.*width=8"):
        Tiny(num_classes=4, width=8).on_load_checkpoint(content)
    Tiny(num_classes=4, lr=7.0, test_flip=True).on_load_checkpoint(content)


def test_foreign_and_broken_checkpoints_are_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not written by seglight"):
        seglight.load(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        seglight.load(tmp_path / "y.ckpt")
    with pytest.raises(FileNotFoundError, match=r"x.ckpt"):
        seglight.load(tmp_path / "z.ckpt")
    torch.save({"seglight": {"class_path": "os.path.join", "init_args": {}}, "state_dict": {}}, tmp_path / "e.ckpt")
    with pytest.raises(ValueError, match="not a seglight model"):
        seglight.load(tmp_path / "e.ckpt")


def test_model_around_a_network_object_works_in_a_notebook(tmp_path):
    model = SemanticModel(network=TinyNetwork(3), num_classes=3)
    trainer = quiet(max_steps=1, limit_val_batches=0)
    trainer.fit(model, datamodule=Blocks())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"network=..."):
        seglight.load(tmp_path / "m.ckpt")
    again = seglight.load(tmp_path / "m.ckpt", network=TinyNetwork(3))
    image = picture()[None]
    assert torch.equal(again(image), model.eval()(image))


class FakeDetector(nn.Module):
    """Follows InstanceModel's contract: one box per image as large as the image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, targets):
        if targets is not None:
            count = sum(len(target["labels"]) for target in targets)
            return {"box": self.weight**2 * (1 + count), "mask": self.weight.abs()}, []
        detections = []
        for image in images:
            height, width = image.shape[-2:]
            assert image.dtype == torch.float32 and image.abs().max() < 5, "normalised, once"
            detections.append(
                {
                    "boxes": torch.tensor([[0.0, 0.0, width, height]]),
                    "labels": torch.tensor([0]),
                    "scores": torch.tensor([0.9]),
                    "masks": torch.ones(1, 1, 1),
                    "windows": torch.tensor([[0.0, 0.0, width, height]]),
                }
            )
        return {}, detections


def target(count, height, width):
    return {
        "boxes": torch.zeros(count, 4),
        "labels": torch.zeros(count, dtype=torch.int64),
        "area": torch.zeros(count),
        "masks": torch.zeros(count, height, width, dtype=torch.bool),
        "iscrowd": torch.zeros(count, dtype=torch.bool),
    }


def test_instance_contract():
    model = InstanceModel(network=FakeDetector(), num_classes=2)
    images = [picture(10, 12), picture(7, 9)]
    for mode in (True, False):
        model.train(mode)
        found = model(images)
        assert [set(d) for d in found] == [{"boxes", "labels", "scores", "masks", "windows"}] * 2
        assert found[1]["boxes"].tolist() == [[0, 0, 9, 7]]
        assert model.network.training is mode
    batch = {"image": images, "target": [target(2, 10, 12), target(0, 7, 9)], "image_id": ["a", "b"]}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    trainer = quiet(max_steps=1)
    trainer.fit(model, loader)
    assert trainer.callback_metrics == {} or "train/loss" in trainer.callback_metrics
    assert model.network.weight.item() != 1.0


def test_base_is_a_lightning_module_that_says_what_it_needs():
    assert issubclass(BaseModel, pl.LightningModule)
    with pytest.raises(TypeError, match="num_classes"):
        Tiny()


def test_a_resumed_curve_goes_on_with_the_losses_since_the_last_point():
    first, second = Tiny(num_classes=4), Tiny(num_classes=4)
    first._losses, first._loss_count = {"loss": torch.tensor(6.0)}, 3
    content = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(content)
    second.on_load_checkpoint(content)
    assert second.running_losses() == {"loss": torch.tensor(2.0)} and second._loss_count == 3


def lr_of(trainer):
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


class Rates(pl.Callback):
    """The learning rates that each step is made with."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_resumed_run_learns_at_the_rate_that_it_is_given(tmp_path):
    """Lightning takes the optimiser's and the schedule's of the checkpoint, and the last one of a poly run is 0."""
    first = quiet(max_steps=4)
    first.fit(Tiny(num_classes=4, lr=0.01, head_lr=10.0), Blocks())
    first.save_checkpoint(tmp_path / "last.ckpt")
    rates = Rates()
    then = quiet(max_steps=8, callbacks=[rates])
    model = Tiny(num_classes=4, lr=0.1, head_lr=10.0, weight_decay=0.5, momentum=0.5)
    then.fit(model, Blocks(), ckpt_path=tmp_path / "last.ckpt")
    assert rates.seen == pytest.approx([0.1 * (1 - step / 8) ** 0.9 for step in range(4, 8)])
    backbone, head = then.optimizers[0].param_groups
    assert head["initial_lr"] == 10 * backbone["initial_lr"] == pytest.approx(1.0)
    assert backbone["weight_decay"] == head["weight_decay"] == 0.5 and head["momentum"] == 0.5


def test_an_endless_run_has_no_poly_schedule():
    endless = {"max_steps": -1, "max_epochs": -1, "max_time": "00:00:00:01"}
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        quiet(**endless).fit(Tiny(num_classes=4), Blocks())
    quiet(**endless).fit(Tiny(num_classes=4, schedule="constant"), Blocks())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_weights_are_refused(precision):
    with pytest.raises(ValueError, match=precision.replace("true", "mixed")):
        quiet(max_steps=1, precision=precision).fit(Tiny(num_classes=4), Blocks())


def test_a_compiled_network_is_the_same_model(tmp_path):
    """`torch.compile` puts a name of its own before those of the weights."""
    plain, model = Tiny(num_classes=4, head_lr=10.0), Tiny(num_classes=4, head_lr=10.0)
    model.network = torch.compile(model.network, backend="eager")
    for ours, theirs in zip(model.parameter_groups(), plain.parameter_groups(), strict=True):
        assert ours["lr"] == theirs["lr"] and len(ours["params"]) == len(theirs["params"])
    trainer = quiet(max_steps=2)
    trainer.fit(model, Blocks())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    weight = seglight.load(tmp_path / "c.ckpt").network.backbone.weight
    assert torch.equal(weight, model.network.backbone.weight) and not torch.equal(weight, plain.network.backbone.weight)
    again = Tiny(num_classes=4, head_lr=10.0)
    again.network = torch.compile(again.network, backend="eager")
    quiet(max_steps=3).fit(again, Blocks(), ckpt_path=tmp_path / "c.ckpt")
    assert not torch.equal(again.network.backbone.weight, weight)


class Curve(pl.loggers.Logger):
    """The steps and losses that are logged."""

    name, version = "curve", 0

    def __init__(self):
        super().__init__()
        self.points = []

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.points.append((step, metrics["train/loss"]))


class Losses(pl.Callback):
    """The loss of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


@pytest.mark.parametrize(("every", "steps"), [(1, list(range(1, 9))), (2, [2, 4, 6, 8]), (0, [])])
def test_the_curve_has_every_step_though_passes_end_in_half_a_step(every, steps):
    """7 batches, 2 to a step: Lightning makes the fourth step of each pass from one."""
    batches, curve, losses = list(Blocks(batch_size=1).train_batches(7)), Curve(), Losses()
    options = {"accumulate_grad_batches": 2, "max_epochs": 2, "limit_val_batches": 0, "log_every_n_steps": every}
    trainer = quiet(callbacks=[losses], logger=curve, **options)
    trainer.fit(Tiny(num_classes=4), torch.utils.data.DataLoader(batches, batch_size=None))
    assert [step for step, _ in curve.points] == steps
    if every == 1:
        starts = [0, 2, 4, 6, 7, 9, 11, 13, 14]
        of_step = [losses.seen[start:end] for start, end in itertools.pairwise(starts)]
        assert [loss for _, loss in curve.points] == pytest.approx([sum(some) / len(some) for some in of_step])


def test_the_curve_is_that_of_one_fit():
    """What is left from an earlier one does not enter the mean, nor must the losses have the same names."""
    model = Tiny(num_classes=4)
    for _ in range(2):
        quiet(max_steps=3, log_every_n_steps=4).fit(model, Blocks())
        curve, losses = Curve(), Losses()
        quiet(max_steps=2, log_every_n_steps=2, callbacks=[losses], logger=curve).fit(model, Blocks())
        assert curve.points == [(2, pytest.approx(sum(losses.seen) / 2))]
        model.loss_weights = {"out": 1.0, "aux": 0.4}


def test_a_continued_run_may_have_other_losses(tmp_path):
    first = quiet(max_steps=3, log_every_n_steps=4)
    first.fit(Tiny(num_classes=4), Blocks())
    first.save_checkpoint(tmp_path / "c.ckpt")
    model = Tiny(num_classes=4, loss_weights={"out": 1.0, "aux": 0.4})
    quiet(max_steps=5, log_every_n_steps=4).fit(model, Blocks(), ckpt_path=tmp_path / "c.ckpt")
    assert set(model.running_losses()) == {"loss", "loss_out", "loss_aux"}


class Freeze(pl.Callback):
    """Stops some weights from learning once the optimiser has them."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, module: module.network.backbone.weight.requires_grad_(False))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_what_is_frozen_later_changes_no_rates(tmp_path, hook):
    options = {"num_classes": 4, "head_lr": 10.0, "bias_lr": 2.0, "decay_bias": False}
    expected = [(group["lr"], group["weight_decay"]) for group in Tiny(**options).parameter_groups()]
    first = quiet(max_steps=4, callbacks=[Freeze(hook)])
    first.fit(Tiny(**options), Blocks())
    first.save_checkpoint(tmp_path / "c.ckpt")
    then = quiet(max_steps=6, callbacks=[Freeze(hook)])
    then.fit(Tiny(**options), Blocks(), ckpt_path=tmp_path / "c.ckpt")
    for trainer in (first, then):
        groups = trainer.optimizers[0].param_groups
        assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == expected


def test_lightnings_search_for_a_learning_rate():
    finder = pl.callbacks.LearningRateFinder(num_training_steps=5)
    quiet(max_steps=2, callbacks=[finder], enable_checkpointing=False).fit(Tiny(num_classes=4), Blocks())
    assert finder.optimal_lr is not None


def test_a_checkpoint_without_weights_is_for_its_strategy_to_load():
    content = {"seglight": {"init_args": {}, "running": {"losses": {}, "count": 0}}}
    Tiny(num_classes=4).on_load_checkpoint(content)
    assert "state_dict" not in content


class Roundabout(SemanticModel):
    """Its arguments go a way that no parser can follow."""

    def __init__(self, num_classes, **kwargs):
        options = dict(kwargs)
        super().__init__(network=TinyNetwork(num_classes), num_classes=num_classes, **options)


def test_options_of_models_that_hide_them(tmp_path):
    trainer = quiet()
    trainer.strategy.connect(Roundabout(4))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert seglight.load(tmp_path / "c.ckpt", test_flip=True).test_flip is True
    with pytest.raises(ValueError, match=r"no option test_flop\. Did you mean test_flip"):
        seglight.load(tmp_path / "c.ckpt", test_flop=True)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimiser_has_the_options_of_the_model(kind):
    model = Tiny(num_classes=4, optimizer=kind, lr=0.5, momentum=0.25, weight_decay=0.125)
    trainer = quiet(max_steps=1, limit_val_batches=0)
    trainer.fit(model, Blocks())
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 0.5 and group["weight_decay"] == 0.125
        assert kind == "adamw" or (group["momentum"] == 0.25 and not group["nesterov"])


def test_the_schedule_says_the_rate_of_a_resumed_run(tmp_path):
    """`get_last_lr` is what callbacks log."""
    first = quiet(max_steps=2, limit_val_batches=0)
    first.fit(Tiny(num_classes=4, schedule="constant", lr=0.1), Blocks())
    first.save_checkpoint(tmp_path / "it.ckpt")
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            (config,) = trainer.lr_scheduler_configs
            seen.append((config.scheduler.get_last_lr(), [g["lr"] for g in trainer.optimizers[0].param_groups]))

    again = quiet(max_steps=3, limit_val_batches=0, callbacks=[Look()])
    again.fit(
        Tiny(num_classes=4, schedule="constant", lr=0.5), Blocks(), ckpt_path=tmp_path / "it.ckpt", weights_only=False
    )
    assert seen[0][0] == seen[0][1] and set(seen[0][0]) == {0.5}


def test_ranks_steps_and_parts_of_a_step_draw_differently():
    model, seen = Tiny(num_classes=4), []
    for rank, step, index in ((0, 0, 0), (1, 0, 0), (0, 1, 2), (0, 0, 1), (0, 0, 0)):
        model._trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=step, global_rank=rank)
        model.on_train_batch_start({"image": torch.zeros(1, 3, 2, 2)}, index)
        seen.append(tuple(torch.rand(4).tolist()))
    assert len(set(seen[:4])) == 4 and seen[4] == seen[0]
