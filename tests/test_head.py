"""`SubspaceHead`: against its definition by autograd and eigenvectors, its step, and how labels reach it."""

import math
import warnings

import pytest
import timm
import torch
from conftest import SmallNet
from torch.nn import functional

import timm_lowrank as tlr
from timm_lowrank import LossHook, LowRankBranch, LowRankConfig, LowRankWarning
from timm_lowrank.core import head as head_module
from timm_lowrank.core.config import PROJECTIONS, STORAGES
from timm_lowrank.core.head import SubspaceHead, fits_labels, leading, rows_of_labels

DOUBLE = torch.float64
WIDTH, RANK, CLASSES = 12, 6, 4
SETTINGS = {"warmup_updates": 0, "update_rows": None, "project_every": 4, "head_sizes": [2, 5], "scale": "unit"}


def build(classes=CLASSES, dtype=DOUBLE, **values):
    config = LowRankConfig(**{**SETTINGS, "reconstruction_weight": 1.0, "head_weight": 0.3, **values})
    return LowRankBranch(WIDTH, RANK, config, dtype=dtype, classes=classes).train()


def batches(count, rows=40, seed=0, size=1.0, spread=1.0):
    """Four classes about means of their own, off the origin: (rows, WIDTH) float64 and labels."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(CLASSES, WIDTH, dtype=DOUBLE, generator=generator)
    for _ in range(count):
        labels = torch.randint(CLASSES, (rows,), generator=generator)
        noise = spread * torch.randn(rows, WIDTH, dtype=DOUBLE, generator=generator)
        yield size * (means[labels] + noise * torch.arange(1, WIDTH + 1) ** -0.5 + 3), labels


def train(branch, data):
    """One training step for each batch: losses, gradients in the activations, and L_s."""
    seen = []
    for rows, labels in data:
        rows = rows.clone().requires_grad_()
        loss = branch.penalty(rows, labels)
        loss.backward()
        branch.update()
        seen.append((float(loss.detach()), rows.grad, float(branch.losses()["head"])))
    return seen


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_factored_and_dense_storage_agree(projection):
    options = {"projection": projection, "nystrom_columns": WIDTH}
    one = train(build(storage="factored", **options), batches(30))
    two = train(build(storage="dense", **options), batches(30))
    for (loss, gradient, _), (twin_loss, twin_gradient, _) in zip(one, two, strict=True):
        assert loss == pytest.approx(twin_loss, rel=1e-9)
        assert torch.allclose(gradient, twin_gradient, rtol=1e-8, atol=1e-11)


def test_loss_and_gradient_by_hand():
    """L_s from W, b and the rows that entered W alone, its gradient by autograd; W gets none."""
    branch = build(reconstruction_weight=0.0)
    data = list(batches(9))
    train(branch, data[:8])
    rows, labels = data[8]
    rows = rows.clone().requires_grad_()
    branch.eval()
    branch.penalty(rows, labels).backward()

    # The range of W after its projection at update 8, and the principal directions of rows 5 to 8 inside it.
    twin = build(reconstruction_weight=0.0, storage="dense")
    train(twin, data[:4])
    entered = []
    for more, more_labels in data[4:8]:
        centred = more + twin.bias
        entered.append(centred / centred.norm(dim=1, keepdim=True))
        train(twin, [(more, more_labels)])
    _, vectors = torch.linalg.eigh(branch.dense_weight())
    range_of_w = vectors[:, -RANK:]
    coordinates = torch.cat(entered) @ range_of_w
    _, inside = torch.linalg.eigh(coordinates.T @ coordinates)
    leading = range_of_w @ inside.flip(1)[:, :5]  # (WIDTH, 5)
    assert torch.allclose((leading.T @ branch.weight.basis[:RANK].T @ branch.head.directions.T).abs(),
                          torch.eye(5, dtype=DOUBLE), atol=1e-9)  # fmt: skip

    directions = branch.weight.basis[:RANK].T @ branch.head.directions.T
    weight, offset = branch.head.weight[:-1], branch.head.weight[-1]
    again = rows.detach().clone().requires_grad_()
    expected = 0.0
    for size in (2, 5):
        for row, label in zip(again, labels, strict=True):
            logits = offset + sum((row + branch.bias) @ directions[:, i] * weight[i] for i in range(size))
            expected = expected + (logits.exp().sum().log() - logits[label]) / (2 * len(rows))
    (0.3 * expected).backward()
    assert float(branch.losses()["head"]) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert torch.allclose(rows.grad, again.grad, atol=1e-12)


@pytest.mark.parametrize("labels", [torch.randint(CLASSES, (30,)), torch.rand(30, CLASSES, dtype=DOUBLE)])
def test_a_whole_step_is_newton_s_on_the_bound_and_never_raises_the_loss(monkeypatch, labels):
    monkeypatch.setattr(head_module, "STEP", 1.0)
    monkeypatch.setattr(head_module, "_RIDGE", 0.0)
    monkeypatch.setattr(head_module, "_MEMORY", 0.0)
    head = SubspaceHead(CLASSES, (2, 5), torch.device("cpu"), DOUBLE)
    head.move(head_module.Rotation(torch.zeros(5, 0, dtype=DOUBLE), torch.randn(5, 50, dtype=DOUBLE)))
    coordinates = 100 * torch.randn(30, 5, dtype=DOUBLE) * torch.tensor([5.0, 2, 1, 0.3, 0.001])
    alone = tlr.core.distributed.Processes()
    before = math.inf
    for _ in range(20):
        weight = head.weight.clone().requires_grad_()
        inputs = functional.pad(coordinates @ head.directions.T, (0, 1), value=1.0)
        masks = [torch.tensor([1.0, 1, 0, 0, 0, 1]), torch.ones(6)]
        targets = rows_of_labels(labels, 30, CLASSES).double()
        losses = [-(targets * (inputs * mask @ weight).log_softmax(dim=1)).sum() for mask in masks]
        moment = sum((inputs * mask).T @ (inputs * mask) for mask in masks)
        (gradient,) = torch.autograd.grad(sum(losses), weight)
        loss, _ = head.loss(coordinates, labels, remember=True)
        assert float(loss) == pytest.approx(float(sum(losses).detach()) / 60, rel=1e-9)
        head.update(alone)
        expected = weight.detach() - 2 * torch.linalg.solve(moment, gradient)
        assert torch.allclose(head.weight, expected, rtol=1e-6, atol=1e-9)
        assert float(loss) <= before * (1 + 1e-12)
        before = float(loss)


@pytest.mark.parametrize(("shape", "tolerance"), [((40, 300), 1e-12), ((300, 400), 2e-3), ((300, 30), 1e-12)])
def test_leading_directions(shape, tolerance):
    """Against the singular value decomposition: what the first 2 and all 8 of them hold of the energy."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(shape, dtype=DOUBLE, generator=generator) * torch.arange(1, shape[0] + 1)[:, None] ** -0.7
    rows = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=DOUBLE, generator=generator))[0] @ samples
    directions, sizes = leading(rows, 8), torch.linalg.svdvals(rows).square()
    assert torch.allclose(directions.T @ directions, torch.eye(8, dtype=DOUBLE), atol=1e-12)
    held = (directions.T @ rows).square().sum(dim=1)
    assert float(held.sum() / sizes[:8].sum()) == pytest.approx(1, abs=tolerance)
    assert float(held[:2].sum() / sizes[:2].sum()) == pytest.approx(1, abs=tolerance / 100 + 1e-12)
    assert (held.diff() <= 0).all()


def test_the_unit_of_the_activations_means_nothing():
    one, two = build(scale="reference"), build(scale="reference")
    small = train(one, batches(30))
    large = train(two, batches(30, size=1e3))
    for (_, _, loss), (_, _, again) in zip(small, large, strict=True):
        assert loss == pytest.approx(again, rel=1e-6)


def test_it_learns_what_the_leading_directions_tell():
    branch = build(head_sizes=[3])
    train(branch, batches(200, rows=128, spread=4))
    rows, labels = next(batches(1, rows=4000, spread=4))
    branch.eval()
    branch.penalty(rows, labels)
    directions = branch.weight.basis[: branch.weight.kept].T @ branch.head.directions.T
    values = (rows + branch.bias) @ directions
    best = torch.zeros(4, CLASSES, dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.LBFGS([best], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(functional.pad(values, (0, 1), value=1.0) @ best, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    lowest = float(closure().detach())
    assert 0.1 < lowest < 1
    assert float(branch.losses()["head"]) < 1.6 * lowest < 0.5 * math.log(CLASSES)


def test_a_projection_leaves_the_logits_where_the_range_of_w_stays():
    """Far along, W hardly moves: what the head says before and after a projection is nearly the same."""
    branch = build(project_every=10, head_sizes=[RANK])
    data = list(batches(201, rows=60))
    train(branch, data[:199])

    def logits():
        values = (data[200][0] + branch.bias) @ branch.weight.basis[: branch.weight.kept].T @ branch.head.directions.T
        return values @ branch.head.weight[:-1] + branch.head.weight[-1]

    before, directions = logits(), branch.head.directions
    train(branch, data[199:200])
    assert not torch.equal(directions, branch.head.directions), "a projection happened"
    assert (logits() - before).abs().max() < 0.1 * before.abs().max()
    assert logits().argmax(dim=1).eq(before.argmax(dim=1)).double().mean() > 0.97


@pytest.mark.parametrize("parts", [(20, 20), (7, 33), (1, 19, 20)])
def test_micro_batches_are_one_batch(parts):
    whole, cut = build(), build()
    for rows, labels in batches(12):
        whole.penalty(rows.requires_grad_(), labels)
        whole.update()
        for piece, names in zip(rows.detach().split(parts), labels.split(parts), strict=True):
            cut.penalty(piece.requires_grad_(), names)
        cut.update()
    assert torch.allclose(whole.head.weight, cut.head.weight, rtol=1e-8, atol=1e-10)


def test_an_overflow_does_not_enter():
    branch = build()
    train(branch, batches(9))
    before = branch.head.weight.clone()
    (rows, labels), *_ = batches(1)
    rows[3] = math.inf
    branch.penalty(rows.requires_grad_(), labels)
    branch.update()
    assert torch.equal(branch.head.weight, before)


def test_batches_that_are_forgotten_do_not_enter():
    branch, twin = build(), build()
    *data, (rows, labels), last = batches(11)
    for one in (branch, twin):
        train(one, data)
    branch.penalty(rows.requires_grad_(), labels)
    branch.forget_batches()
    train(branch, [last])
    train(twin, [last])
    assert torch.equal(branch.head.weight, twin.head.weight)


def test_updates_without_labels_leave_it_as_it_is():
    branch = build()
    train(branch, batches(9))
    weight, moment = branch.head.weight.clone(), branch.head.moment.clone()
    (rows, _), *_ = batches(1)
    branch.penalty(rows.requires_grad_())
    branch.update()
    assert torch.equal(branch.head.weight, weight)
    assert torch.equal(branch.head.moment, moment)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [0, 1])
def test_a_projection_with_few_new_rows_keeps_the_directions_that_they_do_not_tell(storage, rows):
    """Of no new row, as where a checkpoint is made smaller right after a projection, all of them."""
    branch = build(storage=storage, head_sizes=[3])
    train(branch, batches(8))
    before = branch.head.directions @ branch.weight.spanning_rows()
    if rows:
        train(branch, [(before[1:2] - branch.bias, torch.zeros(1, dtype=torch.int64))])
    branch.project()
    after = branch.head.directions @ branch.weight.spanning_rows()
    order = [1, 0, 2] if rows else [0, 1, 2]
    assert ((after @ before.T).abs()[range(3), order] > 0.99).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("updates", [0, 3, 10])
def test_a_state_goes_on_bit_for_bit(storage, updates):
    data = list(batches(updates + 9))
    one, two = build(storage=storage), build(storage=storage)
    train(one, data[:updates])
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    assert all(value.numel() for value in one.state_dict().values())
    for (loss, gradient, _), (twin, twin_gradient, _) in zip(
        train(one, data[updates:]), train(two, data[updates:]), strict=True
    ):
        assert loss == twin
        assert torch.equal(gradient, twin_gradient)


@pytest.mark.parametrize(("width", "rank"), [(1, 1), (33, 16), (257, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_state_out_of_a_file_goes_on_bit_for_bit_in_odd_widths(width, rank, dtype):
    """Products may be rounded otherwise where their numbers lie otherwise in memory, and a file holds them in rows."""
    values = {"warmup_updates": 0, "project_every": 7, "head_sizes": [5, 10], "scale": "unit"}
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn((1, 7, 32, 50)[at % 4], width, generator=generator) for at in range(24)]

    def steps(branch, first):
        for rows in data[first:]:
            rows, labels = rows.to(dtype).requires_grad_(), torch.arange(len(rows)) % 3
            loss = branch.penalty(rows, labels)
            loss.backward()
            branch.update()
            yield loss.detach(), rows.grad, {name: value.clone() for name, value in branch.state_dict().items()}

    def new():
        config = LowRankConfig(branches={"here": rank}, reconstruction_weight=1.0, head_weight=1.0, **values)
        return LowRankBranch(width, rank, config, classes=3)

    whole = list(steps(new(), 0))
    for stop in (2, 8, 13):
        resumed = new()
        resumed.load_state_dict({name: value.contiguous() for name, value in whole[stop - 1][2].items()})
        for (loss, gradient, state), (twin, twin_gradient, twin_state) in zip(
            steps(resumed, stop), whole[stop:], strict=True
        ):
            assert torch.equal(loss, twin)
            assert torch.equal(gradient, twin_gradient)
            assert all(torch.equal(value, twin_state[name]) for name, value in state.items())


def test_a_head_may_be_switched_on_and_off_between_two_trainings():
    branch = build()
    train(branch, batches(9))
    without = build(head_weight=0.0)
    without.load_state_dict(branch.state_dict())
    assert without.head is None
    again = build()
    again.load_state_dict(without.state_dict())
    assert not again.head.ready
    again.load_state_dict(branch.state_dict())
    narrower = build(head_weight=0.0)
    ((rows, _),) = batches(1, rows=2)
    for _ in range(4):
        narrower.penalty(rows)
        narrower.update()
    assert narrower.weight.kept < again.weight.kept
    again.load_state_dict(narrower.state_dict())
    assert not again.head.ready, "its directions were those of another W"
    train(again, batches(1))
    other = build(classes=5)
    with pytest.raises(RuntimeError, match="does not fit 5 classes"):
        other.load_state_dict(branch.state_dict())


def test_labels_of_every_kind():
    hard = torch.tensor([2, -100, 0, 99])
    assert rows_of_labels(hard, 4, 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert rows_of_labels(hard[:2], 4, 3).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]], "two tokens each"
    counts = torch.tensor([1, 3])
    assert rows_of_labels(hard[:2], 4, 3, counts).tolist() == [[0, 0, 1], *([0, 0, 0],) * 3], "one token, and three"
    shares = torch.tensor([[0.3, 0.7, 0], [0, 0, 0]])
    assert torch.allclose(rows_of_labels(shares, 2, 3), shares)
    assert rows_of_labels(torch.tensor([[1, 1, 0]]), 1, 3).tolist() == [[0.5, 0.5, 0]], "several classes at once"
    for wrong in (
        torch.rand(4),
        torch.rand(4, 2),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="do not fit 4 rows and 3 classes"):
            rows_of_labels(wrong, 4, 3)
    assert not any(
        fits_labels(value, 3) for value in ("a", None, {}, torch.rand(4, 1), torch.rand(4), torch.rand(2, 3, 1))
    )


def test_samples_without_a_label_do_not_count():
    branch, twin = build(), build()
    train(branch, batches(9))
    train(twin, batches(9))
    (rows, labels), *_ = batches(1)
    some = labels.clone()
    some[10:] = -100
    branch.penalty(rows.clone().requires_grad_(), some)
    coordinates = twin.weight.reconstruction(rows, twin.bias).coordinates
    expected, _ = twin.head.loss(coordinates[:10], labels[:10], remember=False)
    assert torch.allclose(branch.losses()["head"], expected)


# ------------------------------------------------------------------------------------------------------- in a model


def wrapped(branches=None, **values):
    settings = {"branches": branches or {"body": 6, "pre_logits": {"rank": 4, "head_weight": 0.0}}, "head_weight": 0.3}
    config = LowRankConfig(**{**settings, "warmup_updates": 0, "project_every": 2, **values})
    return tlr.wrap(SmallNet(), config, example_input=torch.zeros(1, 1, 8, 8)).train()


def step(model, images, labels, loss):
    model.zero_grad()
    value = loss(model(images), labels)
    value.backward()
    model.update()
    return value


def test_labels_reach_it_by_hand_and_through_the_criterion(digits):
    images, labels = digits[0][:64], digits[1][:64]
    one, two = wrapped(), wrapped()
    two.load_state_dict(one.state_dict())
    hook = LossHook(torch.nn.CrossEntropyLoss(), two)
    for _ in range(5):
        by_hand = step(one, images, labels, lambda logits, y: functional.cross_entropy(logits, y) + one.penalty(y))
        hooked = step(two, images, labels, hook)
        assert torch.equal(by_hand, hooked)
    assert one.losses()["body"]["head"] > 0
    assert "head" not in one.losses()["pre_logits"]
    assert one.classes == 10
    assert one.unwrap()(images).shape == (64, 10)


def test_without_labels_there_is_one_warning_and_the_rest_works(digits):
    model = wrapped()

    def loss(logits, labels):
        return functional.cross_entropy(logits, labels) + model.penalty()

    images, labels = digits[0][:32], digits[1][:32]
    with pytest.warns(LowRankWarning, match="no effect without labels"):
        step(model, images, labels, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, images, labels, loss)
    assert "head" not in model.losses()["body"]


def test_labels_that_a_criterion_takes_and_a_head_cannot_are_passed_over(digits):
    model = wrapped()
    hook = LossHook(lambda output, target: functional.mse_loss(output[:, :1], target), model)
    with pytest.warns(LowRankWarning, match="no effect without labels"):
        step(model, digits[0][:32], torch.rand(32, 1), hook)


@pytest.mark.parametrize(
    "targets",
    [
        lambda labels: torch.randn(len(labels), 10),  # of a regression, or a teacher's logits
        lambda labels: torch.randn(len(labels), 10).log_softmax(dim=1),
        lambda labels: torch.full((len(labels), 10), torch.nan),
        lambda labels: labels + 10,
    ],
    ids=["logits", "logarithms", "NaN", "class numbers of another network"],
)
def test_targets_that_are_no_labels_teach_nothing_and_that_is_said_once(digits, targets):
    model = wrapped()
    images, labels = digits[0][:32], digits[1][:32]
    hook = LossHook(lambda output, target: output.square().mean(), model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [float(step(model, images, targets(labels), hook).detach()) for _ in range(14)]
    assert all(math.isfinite(loss) and loss >= 0 for loss in losses)
    assert float(model.losses()["body"]["head"]) == 0
    assert not model.branches["body"].head.weight.any()
    (message,) = [str(one.message) for one in caught]
    assert "the subspace head learns nothing" in message
    assert "a class number in [0, 10) or a share of each of 10 classes" in message


def test_class_numbers_of_a_larger_classifier_are_left_out_and_that_is_said_once(digits):
    model = wrapped()
    model.classifier = torch.nn.Linear(model.classifier.in_features, 13)
    images, labels = digits[0][:32], digits[1][:32] + 3

    def train(count):
        for _ in range(count):
            step(model, images, labels, lambda logits, y: functional.cross_entropy(logits, y) + model.penalty(y))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(14)
    (message,) = [str(one.message) for one in caught]
    assert "leaves out the labels from 10 on, and 12 is one" in message
    assert "set model.unwrap().num_classes" in message
    model.unwrap().num_classes = 13
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(14)
    assert model.branches["body"].head.classes == 13


@pytest.mark.parametrize("labels", [torch.randint(2, (8,)), torch.rand(8), torch.rand(8, 1), None])
def test_a_single_logit_has_no_head(digits, labels):
    """Of a regression, or of two classes: the softmax of one class is 1 whatever the head reads."""
    network = timm.create_model("test_resnet", in_chans=1, num_classes=1)
    model = tlr.wrap(network, LowRankConfig(branches={"layer3": 4}), example_input=digits[0][:2]).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(digits[0][:8])
        model.penalty(labels)
    assert not model.uses_labels


def test_class_numbers_go_before_the_logits_of_a_teacher(digits):
    """Of a criterion that takes both."""
    one, two = wrapped(), wrapped()
    two.load_state_dict(one.state_dict())
    images, labels = digits[0][:32], digits[1][:32]
    teacher = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))

    def distil(logits, taught, y):
        return functional.cross_entropy(logits, y) + functional.mse_loss(logits, taught)

    hook = LossHook(distil, two)
    for _ in range(6):
        by_hand = step(one, images, labels, lambda logits, y: distil(logits, teacher, y) + one.penalty(y))
        hooked = step(two, images, labels, lambda logits, y: hook(logits, teacher, y))
        assert torch.equal(by_hand, hooked)


def test_labels_that_do_not_fit_are_named_at_the_first_penalty(digits):
    model = wrapped()
    model(digits[0][:32])
    with pytest.raises(ValueError, match=r"labels of shape \(7,\) and type torch.int64 do not fit 32 rows"):
        model.penalty(digits[1][:7])


def test_a_classifier_that_was_replaced_decides_the_classes(digits):
    """Whatever the network says of itself."""
    network = SmallNet()
    network.num_classes = 3
    model = tlr.wrap(network, LowRankConfig(branches={"body": 4}), example_input=digits[0][:2])
    assert (model.classes, model.branches["body"].head.classes) == (10, 10)


def test_heads_follow_a_classifier_that_is_reset(digits):
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    settings = {"branches": {"layer3": 4}, "warmup_updates": 0, "project_every": 2}
    model = tlr.wrap(network, LowRankConfig(**settings), example_input=digits[0][:2]).train()
    images, labels = digits[0][:32], digits[1][:32]

    def train(count):
        for _ in range(count):
            step(model, images, labels % model.num_classes, lambda logits, y: model.penalty(y) + logits.square().mean())

    train(3)
    w = model.branches["layer3"].dense_weight()
    model.reset_classifier(4)
    assert torch.equal(model.branches["layer3"].dense_weight(), w)
    train(3)
    assert (model.classes, model.branches["layer3"].head.classes) == (4, 4)
    assert model.losses()["layer3"]["head"] > 0
    again = tlr.wrap(
        timm.create_model("test_resnet", in_chans=1, num_classes=10),
        LowRankConfig(**settings),
        example_input=images[:2],
    ).train()
    again.reset_classifier(4)
    again.load_state_dict(model.state_dict())
    again(images)
    again.penalty(labels % 4)
    assert torch.equal(again.branches["layer3"].head.weight, model.branches["layer3"].head.weight)
    model.reset_classifier(0)
    train_loss = model(images).square().mean() + model.penalty(labels)
    assert train_loss.isfinite()
    assert (model.classes, model.uses_labels) == (None, False)


def test_tokens_have_the_label_of_their_image(digits):
    model = wrapped({"body": {"rank": 4, "view": "token"}})
    for _ in range(4):
        step(
            model,
            *[part[:32] for part in digits],
            lambda logits, y: functional.cross_entropy(logits, y) + model.penalty(y),
        )
    assert model.losses()["body"]["head"] > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_follows_the_module(device):
    branch = build(dtype=torch.float32)
    train(branch, ((rows.float(), labels) for rows, labels in batches(9)))
    branch.half()
    assert branch.head.weight.dtype == torch.float32
    branch.to(device)
    assert {value.device.type for value in branch.head.state().values()} == {device}
