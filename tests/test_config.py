"""`LowRankConfig`: what it takes, what it refuses and how it says so, and the way through JSON."""

import dataclasses
import json
import re

import pytest

from timm_lowrank import LowRankConfig
from timm_lowrank.errors import nearest

WRONG_BRANCHES = [0, -2, 2.5, True, None, {}, {"rank": 5, "reconstruction_weight": -1}]
WRONG_BRANCHES += [{"rank": 5, "view": "tokens"}, {"rank": 5, "channel_dim": 0}, {"rank": 5, "channel_dim": "last"}]
WRONG = {
    "scale": ["papers", None, 1],
    "step_rule": ["normalised", ""],
    "projection": ["svd"],
    "storage": ["sparse"],
    "reconstruction_weight": [-1.0, float("nan"), float("inf"), "1", True],
    "strength": ["weak", -1, float("nan"), None, 10**400],
    "norm_weight": [-0.1, float("nan")],
    "head_weight": [-0.1, float("inf"), "a"],
    "head_sizes": [(), (0,), (2.5,), 5, "5"],
    "step_size": [0.0, -0.5, 1.5, float("nan"), "0.5"],
    "bias_momentum": [-0.1, 1.1, None],
    "project_every": [0, -1, 2.5, None, True],
    "nystrom_columns": [0, 1.5],
    "nystrom_runs": [0, None],
    "update_rows": [0, -1, 1.5, True],
    "oversampling": [-1, 0.5, None],
    "warmup_updates": [-1, 2.5, None],
    "seed": [1.5, None, "0"],
    "branches": ["3-LR", {}, None, 5, *({"layer3": spec} for spec in WRONG_BRANCHES)],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_wrong_values_are_named(field, value):
    named = "layer3" if isinstance(value, dict) and value else re.escape(f"{field}={value!r}")
    with pytest.raises(ValueError, match=f"^LowRankConfig: .*{named}"):
        LowRankConfig(**{field: value})


def test_every_problem_is_in_one_message():
    parts = ["scale='x'.*reference, unit, batch, paper", "project_every=0", "seed=None", "'a'", "'rnak'.*rank[?]"]
    with pytest.raises(ValueError, match="^LowRankConfig: .*" + ".*; .*".join(parts)):
        LowRankConfig(scale="x", project_every=0, seed=None, branches={"a": 0, "b": {"rank": 3, "rnak": 2}})


def test_the_largest_step_depends_on_the_rule():
    assert LowRankConfig(step_rule="fixed", step_size=7.5).step_size == 7.5
    with pytest.raises(ValueError, match=r"step_size=7\.5 must lie in \(0, 1\.0\]"):
        LowRankConfig(step_rule="normalized", step_size=7.5)


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LowRankConfig().seed = 3
    with pytest.raises(TypeError):
        LowRankConfig("1-LR")


@pytest.mark.parametrize(
    "config",
    [
        LowRankConfig(),
        LowRankConfig(branches="2-LR", update_rows=None, nystrom_columns=7, step_rule="fixed", step_size=2, seed=-4),
        LowRankConfig(branches={"layer3": 50, "pre_logits": {"rank": 5, "norm_weight": 0.25}}, storage="dense"),
    ],
    ids=["default", "preset", "mapping"],
)
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert LowRankConfig.from_dict(values) == config
    assert set(values) == {field.name for field in dataclasses.fields(LowRankConfig)}


def test_a_dictionary_is_no_view_of_the_configuration():
    config = LowRankConfig(branches={"layer3": {"rank": 5}})
    config.to_dict()["branches"]["layer3"]["rank"] = 6
    assert config.branches["layer3"]["rank"] == 5


def test_what_becomes_of_the_dictionary_that_was_given_does_not_matter():
    branches = {"layer3": {"rank": 5}, "layer4": 3}
    config = LowRankConfig(branches=branches)
    branches["layer3"]["rank"], branches["layer4"] = 0, 0
    assert config.ranks() == {"layer3": 5, "layer4": 3}


def test_layers_and_options_that_are_no_names():
    with pytest.raises(ValueError, match=r"the layer 0 in branches is no name; names are strings, .*: '0'"):
        LowRankConfig(branches={0: 5})
    with pytest.raises(ValueError, match=r"branches\['layer3'\] has no option 1"):
        LowRankConfig(branches={"layer3": {"rank": 5, 1: 2}})


def test_unknown_keys_and_wrong_values():
    values = {**LowRankConfig(seed=3).to_dict(), "project_evry": 5, "zzz": 1}
    with pytest.raises(ValueError, match=r"'project_evry'\. Did you mean: project_every.*zzz"):
        LowRankConfig.from_dict(values)
    with pytest.warns(UserWarning, match="project_evry.*Left out"):
        assert LowRankConfig.from_dict(values, strict=False) == LowRankConfig(seed=3)
    with pytest.raises(ValueError, match="project_every=0"):
        LowRankConfig.from_dict({"project_every": 0}, strict=False)


def test_options_of_one_branch():
    config = LowRankConfig(
        reconstruction_weight=2.0,
        norm_weight=0.5,
        head_weight=0.25,
        seed=9,
        branches={
            "a": 5,
            "b": {"rank": 3, "reconstruction_weight": 0.1},
            "c": {"rank": 2, "norm_weight": 0, "head_weight": 1},
        },
    )
    assert config.for_branch("a") == config
    each = [config.for_branch(layer) for layer in "abc"]
    assert [(own.reconstruction_weight, own.norm_weight) for own in each] == [(2.0, 0.5), (0.1, 0.5), (2.0, 0)]
    assert [own.head_weight for own in each] == [0.25, 0.25, 1]
    assert config.for_branch("b").branches == {"b": 3}
    assert config.for_branch("b").seed == 9


def test_strength_gives_the_weights_that_nobody_set():
    def weights(layer="layer3", **values):
        return dataclasses.astuple(LowRankConfig(**values).weights(layer))

    assert weights() == weights(strength=1) == weights(strength="standard")
    assert weights(strength=3) == tuple(3 * weight for weight in weights())
    assert weights(strength=0) == (0, 0, 0)
    light, standard, strong = (weights(strength=name) for name in ("light", "standard", "strong"))
    assert (light[0], light[2]) < (standard[0], standard[2]) < (strong[0], strong[2])
    assert light[2] > 0
    assert weights("pre_logits")[0] < weights()[0]
    assert weights("pre_logits")[2] == 0
    assert weights(strength="strong", reconstruction_weight=7, head_weight=0) == (7, 0, 0)
    own = {"layer3": {"rank": 4, "reconstruction_weight": 2, "norm_weight": 1, "head_weight": 3}}
    assert weights(branches=own, strength=9) == (2, 1, 3)
    # The printed loss has both terms and nothing that is not the paper's.
    reconstruction, norm, head = weights(scale="paper")
    assert reconstruction == norm > 0
    assert weights(scale="paper", strength=9) == (reconstruction, norm, head)
    assert head == 0
    assert weights(scale="paper", reconstruction_weight=0.5) == (0.5, 0.5, 0)
    assert weights(scale="paper", reconstruction_weight=0.5, norm_weight=0) == (0.5, 0, 0)


def test_nearest_names():
    assert nearest("layr3", ["layer1", "layer3", "stem"], count=1) == "Did you mean: layer3?"
    assert nearest("zzz", ["a", "b"]) == "Did you mean: a, b?", "a few names are all listed if none is near"
    assert nearest("zzz", []) == "There are none."
