"""Several real processes that train one model: the same as one process with the same global batches.

One start of two processes does all runs (`processes/worker.py`); each test compares one of them.
"""

import math
import re

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from processes import exchange, scenarios, worker
from processes.scenarios import DDP, FSDP, MACHINES, OVERFLOW, alone, build, distance
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import timm_lowrank as tlr

BY_NAME = {scenario.name: scenario for scenario in (*DDP, *FSDP)}
TOLERANCE = 5e-5  # relative, after 22 updates in float32; another order of summation alone gives up to 1.2e-5


def one_accelerator():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, digits):
    """Folder of the launch, with the outcomes of one process of a run with a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save(digits, folder / "data.pt")
    accelerator = one_accelerator()
    whole = scenarios.uninterrupted(accelerator, digits)
    paused = scenarios.pause(accelerator, digits, folder / "from-one")
    yield folder, whole, paused
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def ranks(one_process):
    """The results of each of two processes."""
    folder, *_ = one_process
    results = worker.together(folder, "ddp", "resume", "exchange", "fsdp")
    assert [(one["processes"], one["backend"]) for one in results] == [(2, "gloo")] * 2
    return results


def both(ranks, name):
    results = [one[name] for one in ranks]
    for rank, one in enumerate(results):
        assert not one.get("error"), f"process {rank}: {one['error']}"
    return results


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("name", BY_NAME)
def test_two_processes_train_as_one(ranks, digits, name):
    first, second = both(ranks, name)
    assert_same_bits(first["outcome"], second["outcome"])
    assert_same_bits(first["state"], second["state"])  # the factor, the counters, everything that is saved
    apart, where = distance(first["outcome"], alone(BY_NAME[name], digits))
    assert apart < TOLERANCE, where
    settings = tlr.LowRankConfig(**BY_NAME[name].config)
    assert (first["rows"] > 0) == (settings.storage == "factored")
    if settings.update_rows:  # with them the factor grows, and not with the global batch; 6 is the larger rank
        assert max(first["rows"], second["rows"]) <= 6 + settings.project_every * settings.update_rows


@pytest.mark.parametrize("scenario", FSDP, ids=lambda scenario: scenario.name)
def test_sharded_models_are_saved_and_loaded(ranks, scenario):
    for result in both(ranks, scenario.name):
        assert result["sharded"]
        assert len(result["loaded"]) == 3
        for loaded in result["loaded"].values():
            assert_same_bits(loaded, result["outcome"])


def test_sharded_by_accelerate_a_run_goes_on_from_its_checkpoint(ranks, digits):
    first, second = both(ranks, "fsdp-accelerate")
    assert first["kind"] == "FSDP"
    assert first["sharded"]
    assert_same_bits(first["loaded"], second["loaded"])
    assert_same_bits(first["loaded"], first["continued"])
    assert distance(first["loaded"], alone(first["scenario"], digits))[0] < TOLERANCE


def test_an_overflow_on_one_process_leaves_all_alike_and_sound(ranks, digits):
    first, second = both(ranks, OVERFLOW.name)
    assert_same_bits(first["state"], second["state"])
    # Of the skipped step the rows of the sound process are kept for the next one, of the other those that are zeros.
    assert distance(first["outcome"], alone(OVERFLOW, digits))[0] < 0.05


def test_two_machines_train_as_one(ranks, one_process, tmp_path):
    """Each is the first process of its machine. Programs that were started in another way may round otherwise."""
    (tmp_path / "data.pt").symlink_to(one_process[0] / "data.pt")
    machines = worker.together(tmp_path, "machines", machines=2)
    assert [one["processes"] for one in machines] == [2, 2]
    for scenario in MACHINES:
        first, second = both(machines, scenario.name)
        assert_same_bits(first["outcome"], second["outcome"])
        assert_same_bits(first["state"], second["state"])
        apart, where = distance(first["outcome"], ranks[0][scenario.name]["outcome"])
        assert apart < TOLERANCE, where


# checkpoints


def test_an_optimizer_that_steps_to_be_loaded_makes_no_update():
    """torch's distributed checkpoints let a fresh optimizer step once, to have something to load into."""
    model = build(DDP[0])
    optimizer = torch.optim.AdamW(model.parameters())
    tlr.attach(optimizer, model)
    assert get_optimizer_state_dict(model, optimizer)["state"]
    assert all(branch.updates == 0 for branch in model.branches.values())
    with pytest.raises(RuntimeError, match="without a penalty"):
        optimizer.step()  # at a learning rate above zero it is a mistake
    optimizer.param_groups[0]["lr"] = 0.0
    model(torch.rand(4, 1, 8, 8))
    model.penalty().backward()
    optimizer.step()  # with a batch it is a real one, as at the start of a warm-up
    assert all(branch.updates == 1 for branch in model.branches.values())


def test_two_processes_go_on_where_one_stopped(ranks, one_process):
    _, whole, _ = one_process
    first, second = both(ranks, "resume")
    assert_same_bits(first["taken over"], second["taken over"])
    assert distance(first["taken over"], whole)[0] < TOLERANCE


def test_one_process_goes_on_where_two_stopped(ranks, one_process, digits):
    folder, whole, paused = one_process
    assert_same_bits(paused, whole)
    first, _ = both(ranks, "resume")
    taken_over = scenarios.go_on(one_accelerator(), digits, folder / "from-two")
    assert distance(taken_over, whole)[0] < TOLERANCE
    assert_same_bits(first["paused"], first["whole"])


# several batches on several processes, and their end


def test_a_process_may_have_fewer_batches_than_another(ranks, digits):
    first, second = both(ranks, "unequal_numbers_of_batches")
    assert_same_bits(first["outcome"], second["outcome"])
    twin = exchange.unequal_numbers_of_batches(digits)
    assert twin["outcome"]["1: W"].norm() > 0.1
    assert distance(first["outcome"], twin["outcome"])[0] < TOLERANCE


def test_copies_share_as_the_model_does_and_the_main_process_may_look_at_it_alone(ranks):
    first, second = both(ranks, "copied")
    for one, two in zip(first["outcomes"], second["outcomes"], strict=True):
        assert_same_bits(one, two)
        assert_same_bits(one, first["outcomes"][0])


# the draw of rows


def test_the_draw_takes_the_rows_of_all_processes_evenly(ranks):
    first, second = both(ranks, "draws")
    assert torch.equal(first["counts"], second["counts"])
    counts = first["counts"].double()
    share = exchange.TAKEN / len(counts)
    assert counts.sum() == exchange.DRAWS * exchange.TAKEN
    spread = math.sqrt(exchange.DRAWS * share * (1 - share))
    assert (counts - exchange.DRAWS * share).abs().max() < 4 * spread  # each row: 4 standard errors
    own = exchange.COUNTS[0]
    mean = exchange.TAKEN * own / len(counts)  # of the hypergeometric number of rows of the first process
    variance = mean * (1 - own / len(counts)) * (len(counts) - exchange.TAKEN) / (len(counts) - 1)
    assert abs(counts[:own].sum() / exchange.DRAWS - mean) < 4 * math.sqrt(variance / exchange.DRAWS)


def step_of_w(rows, update_rows, seed, step_rule="fixed"):
    """W after one Update Step from zero, (m, m) float64."""
    config = tlr.LowRankConfig(
        step_rule=step_rule, step_size=0.02, update_rows=update_rows, seed=seed, scale="paper", warmup_updates=0,
        reconstruction_weight=1.0, bias_momentum=0.0,
    )  # fmt: skip
    branch = tlr.LowRankBranch(rows.shape[1], 3, config, dtype=torch.float64)
    branch.penalty(rows)
    branch.update()
    return branch.dense_weight()


def steps_of_w(rows, **options):
    """With 6 of the rows, drawn with 400 seeds, (400, m, m) float64."""
    return torch.stack([step_of_w(rows, 6, seed, **options) for seed in range(400)])


@pytest.fixture(scope="module")
def rows(digits):
    """(48, 8) float64: 8 pixels of 48 digits, sorted by their size, so that some rows count far more than others."""
    pixels = digits[0][:48, 0, 3].double()
    return pixels[pixels.norm(dim=1).argsort()]


def deviations(samples, mean):
    """How many standard errors the means of 36 different entries of symmetric matrices (n, 8, 8) lie from `mean`."""
    upper = torch.ones(8, 8, dtype=torch.bool).triu()
    varies = samples.std(dim=0)[upper] > 0
    error = samples.std(dim=0)[upper][varies] / math.sqrt(len(samples))
    return (samples.mean(dim=0) - mean)[upper][varies] / error


def test_a_step_with_few_rows_is_unbiased(rows):
    """Its mean over the draws is the step with all rows: a gradient step is linear in what the rows contribute."""
    full = step_of_w(rows, None, 0)
    samples = steps_of_w(rows)
    off = deviations(samples, full)
    assert len(off) > 20
    assert off.abs().max() < 4  # by chance in 1 of 400 such tests, but the seeds are fixed
    # It has teeth: the standard error is small beside the step, and a draw of the first rows alone is found out.
    assert (samples.mean(dim=0) - full).norm() < 0.1 * full.norm()
    assert deviations(steps_of_w(rows[:40]), full).abs().max() > 8


def test_a_normalized_step_with_few_rows_keeps_its_direction(rows):
    """Its length is in units of the largest stable step of the rows that were drawn, which is shorter on average."""
    full = step_of_w(rows, None, 0, "normalized")
    mean = steps_of_w(rows, step_rule="normalized").mean(dim=0)
    assert (mean * full).sum() > 0.99 * mean.norm() * full.norm()
    assert 0.5 * full.norm() < mean.norm() < full.norm()


# what cannot work


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("loaded_by_one", "differ in their number of updates.*load the same checkpoint on every process"),
        ("loaded_by_one_later", "differ in their number of updates"),
        ("loaded_from_different_files", "differ in W or b.*load the same checkpoint on every process"),
        ("configured_differently", "differ in their configuration.*Wrap the same configuration"),
        ("viewed_differently", "differ in their configuration.*Wrap the same configuration"),
        ("nothing_anywhere", "RuntimeError: .*without a penalty"),
        ("left_out_an_update", "LowRankError: process 1 went on to another batch without the update"),
        ("left_out_the_first_update", "LowRankError: process 1 went on to another batch without the update"),
        ("made_an_update_more", r"LowRankError: process 1 called update\(\) once more than the others"),
        ("let_one_end_early", r"LowRankError: .*join\(throw_on_early_termination=True\) stops all with the first"),
    ],
)
def test_processes_that_are_not_alike_stop_and_say_why(ranks, job, words):
    for one in both(ranks, job):
        assert re.search(words, one["refused"]), one["refused"]
