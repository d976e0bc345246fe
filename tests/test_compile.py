"""torch.compile with its own backend, inductor: one graph, compiled once for a whole training, with eager's numbers."""

import copy

import pytest
import torch
from processes import scenarios
from processes.scenarios import Scenario, build, distance, optimizer_of, outcome, training
from torch import nn

import timm_lowrank as tlr


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_runs(model, scenario, data, call):
    """Trains; every graph after the first one, and every break in it, is an error."""
    optimizer = optimizer_of(model)
    training(scenario, model, call, optimizer, data, stop=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        training(scenario, model, call, optimizer, data, start=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    return outcome(model)


def small():
    """Few kernels: each costs the C++ compiler seconds."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    config = tlr.LowRankConfig(branches={"2": 4}, warmup_updates=5, reconstruction_weight=0.3)
    return tlr.wrap(network, config, example_input=torch.zeros(1, 1, 8, 8))


def test_inductor_compiles_the_wrapper_once_and_trains_as_eager(digits):
    scenario = Scenario("compiled", steps=30)
    model, twin = small().train(), small().train()
    with torch._inductor.config.patch({"compile_threads": 1, "cpp.simdlen": 1}):  # what need not be tried out
        compiled = compiled_runs(model, scenario, digits, torch.compile(model, fullgraph=True))
    training(scenario, twin, twin, optimizer_of(twin), digits)
    assert twin.branches["2"].updates == 30
    assert distance(compiled, outcome(twin))[0] < 1e-4


def test_a_model_compiled_in_place_with_a_view_is_compiled_once(digits):
    scenario = Scenario("compiled", {"update_rows": 10}, network="tokens")
    model = build(scenario)
    model.compile(fullgraph=True, backend="aot_eager")
    assert distance(compiled_runs(model, scenario, digits, model), scenarios.alone(scenario, digits))[0] < 1e-4


def test_a_compiled_step_does_not_compile_the_loop_of_the_branches(digits):
    """What they ask about the loop would be compiled in, and anew with every answer."""
    scenario = Scenario("step", {"update_rows": 10})
    model, twin = build(scenario), build(scenario)

    def step(one, images, labels):
        return nn.functional.cross_entropy(one(images), labels) + one.penalty(labels)

    compiled = torch.compile(lambda images, labels: step(model, images, labels), backend="eager")
    for images, labels in zip(*(part[:96].split(8) for part in digits), strict=True):
        loss, expected = compiled(images, labels), step(twin, images, labels)
        assert torch.allclose(loss, expected, atol=1e-5)
        for one in (model, twin):
            one.update()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "one on either side of the penalty"


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_can_be_switched_at_any_time(digits, fullgraph):
    """The compiler does not see hooks that are registered after a module was compiled; these are in the graph."""
    graphs, runs = [], []

    def backend(graph, _):
        graphs.append(graph)
        return lambda *inputs: (runs.append(1), graph(*inputs))[1]

    model = build(Scenario("switched"))
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    for mode in ["off", "on", "eval", "on", "off", "on", "eval", "off", "eval", "on", "off", "eval", "on"]:
        compiled.train(mode != "eval")
        model.enable(mode != "off")
        for images in digits[0][:48].split(16):
            assert torch.allclose(compiled(images), model.backbone(images), atol=1e-5)
            if mode != "on":
                continue
            with model.capture() as seen:
                model.backbone(images)
            twins = [copy.deepcopy(branch).penalty(seen[layer]) for layer, branch in model.branches.items()]
            assert torch.allclose(model.penalty(), sum(twins), atol=1e-5)
            model.update()
    assert len(graphs) == 3, "one for each mode, each with the whole network"
    assert len(runs) == 3 * 13
