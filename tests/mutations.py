"""Shows that the tests catch deliberate faults: each is put into a copy of the code, and its tests must fail.

    python tests/mutations.py                 # all of them, about a minute each
    python tests/mutations.py --list
    python tests/mutations.py "radius one ulp too large" "label shifted"

Not part of the suite. A mutation whose text is no longer in the code is an error: move it along with the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One fault: `old` stands exactly once in `file`, and with `new` in its place one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


MUTATIONS = (
    # ------------------------------------------------------------------------------------------------------ the branch
    Mutation(
        "the reference norm follows nothing", "timm_lowrank/core/branch.py",
        "_FOLLOWS, _GROWTH = 0.01, 1.03", "_FOLLOWS, _GROWTH = 0.0, 1.03",
        "tests/test_branch.py -k nearly_constant",
    ),
    Mutation(
        "the reference norm follows the first update, too", "timm_lowrank/core/branch.py",
        "        if not begins:  #", "        if True:  #",
        "tests/test_trainer.py -k accumulation",
    ),
    Mutation(
        "embeddings about the origin of the layer", "timm_lowrank/core/embedder.py",
        "self.directions.dtype), self.directions, self.offset)", "self.directions.dtype), self.directions)",
        "tests/test_embedder.py",
    ),
    Mutation(
        "wrong sign in L_c", "timm_lowrank/core/branch.py",
        "total = squared * seen.errors.mean()",
        "total = -squared * seen.errors.mean()",
        "tests/test_branch.py",
    ),
    Mutation(
        "wrong sign in the gradient of L_c", "timm_lowrank/core/branch.py",
        "slopes = Slopes(squared / count)", "slopes = Slopes(-squared / count)",
        "tests/test_branch.py -k activations",
    ),
    Mutation(
        "the mean of a layer not held", "timm_lowrank/core/branch.py",
        "value=-1).clamp_min_(0)", "value=-1).clamp_max_(0)",
        "tests/test_branch.py",
    ),
    Mutation(
        "logits taken for shares", "timm_lowrank/core/head.py",
        "targets = torch.where(shares, targets, 0)", "targets = torch.where(shares | True, targets, 0)",
        "tests/test_head.py",
    ),
    Mutation(
        "a collapse at the first odd batch", "timm_lowrank/core/branch.py",
        "if symptom and self._doubtful:", "if symptom:",
        "tests/test_branch.py",
    ),
    Mutation(
        "sequences taken for batches", "timm_lowrank/layers.py",
        "len(double) == 2 * len(single) and in_order", "in_order",
        "tests/test_views.py",
    ),
    Mutation(
        "wrappers taken off past the branches", "timm_lowrank/core/model.py",
        'if name in ("backbone", *_INNER):', 'if name == "backbone":',
        "tests/test_model.py",
    ),
    Mutation(
        "projection skipped", "timm_lowrank/core/branch.py",
        "        if projects:\n            self._project(", "        if False:\n            self._project(",
        "tests/test_branch.py",
    ),
    Mutation(
        "Update Step in the wrong direction", "timm_lowrank/core/factored.py",
        "beta=0, alpha=-1).mul_(scale)", "beta=0, alpha=1).mul_(scale)",
        "tests/test_branch.py",
    ),
    Mutation(
        "rank one too large", "timm_lowrank/core/factored.py",
        "return projection.exact_factored(self.core, self.gram, rank)",
        "return projection.exact_factored(self.core, self.gram, rank + 1)",
        "tests/test_branch.py",
    ),
    Mutation(
        "warm-up ignored", "timm_lowrank/core/branch.py",
        "return min(1.0, max(0.0, self.updates / warmup - 1.0)) if warmup else 1.0", "return 1.0",
        "tests/test_branch.py",
    ),
    Mutation(
        "hooks left on the network", "timm_lowrank/core/capture.py",
        "                hooks.pop(key, None)\n", "                pass\n",
        "tests/test_capture.py tests/test_model.py",
    ),
    Mutation(
        "effective rank one too small", "timm_lowrank/core/spectrum.py",
        "return 1 + sum(ratio < share - _SHARE_TOLERANCE for ratio in ratios)",
        "return sum(ratio < share - _SHARE_TOLERANCE for ratio in ratios)",
        "tests/test_spectrum.py",
    ),
    # ------------------------------------------------------------------------------------------------------- processes
    Mutation(
        "moments not joined", "timm_lowrank/core/branch.py",
        "with full_precision(self.bias.device):\n            self._moments.sum_over(self.processes)\n",
        "with full_precision(self.bias.device):\n",
        "tests/test_processes.py",
    ),
    Mutation(
        "ranks reversed", "timm_lowrank/core/distributed.py",
        "return 0 if self.alone else dist.get_rank(self._group)",
        "return 0 if self.alone else dist.get_world_size(self._group) - 1 - dist.get_rank(self._group)",
        "tests/test_processes.py",
    ),
    # --------------------------------------------------------------------------------------------------------- attacks
    Mutation(
        "radius one ulp too large", "timm_lowrank/evaluation/attacks/balls.py",
        "_inward(images, upper, reach), unit)", "_inward(images, upper, reach).nextafter(torch.ones(())), unit)",
        "tests/test_attacks.py",
    ),
    Mutation(
        "a convolution that is read twice is folded", "timm_lowrank/evaluation/folding.py",
        "isinstance(norm, nn.BatchNorm2d) and readers[output.grad_fn] == 1", "isinstance(norm, nn.BatchNorm2d)",
        "tests/test_folding.py",
    ),
    Mutation(
        "folded logits are not compared", "timm_lowrank/evaluation/folding.py",
        "if pairs and not _agree(", "if pairs and None is _agree(",
        "tests/test_folding.py",
    ),
    Mutation(
        "hooked modules are folded", "timm_lowrank/evaluation/folding.py",
        "module._backward_pre_hooks)):\n        return False", "module._backward_pre_hooks)):\n        pass",
        "tests/test_folding.py",
    ),
    Mutation(
        "networks stay folded", "timm_lowrank/evaluation/folding.py",
        "what is trained later\n        _unfold(pairs)", "what is trained later\n        pass",
        "tests/test_folding.py",
    ),
    Mutation(
        "plain predictions are folded, too", "timm_lowrank/evaluation/pixels.py",
        "channels_last: bool = True, many: bool = False", "channels_last: bool = True, many: bool = True",
        "tests/test_folding.py",
    ),
    Mutation(
        "normalised with the mean alone", "timm_lowrank/evaluation/pixels.py",
        "normalised = (images.float() - self.mean) / self.std", "normalised = images.float() - self.mean",
        "tests/test_evaluation.py tests/test_attacks.py",
    ),
    Mutation(
        "most likely class for the least likely", "timm_lowrank/evaluation/attacks/gradient.py",
        "len(pixels)).argmin(dim=1)", "len(pixels)).argmax(dim=1)",
        "tests/test_attacks.py",
    ),
    Mutation(
        "a decisive check of masking overlooked", "timm_lowrank/evaluation/masking/verdict.py",
        "MASKED if any(check.decisive for check in failed)", "MASKED if all(not check.decisive for check in failed)",
        "tests/test_masking.py",
    ),
    Mutation(
        "Wilson's interval too narrow", "timm_lowrank/evaluation/results.py",
        "share, spread = hits / count, z * z / count", "share, spread = hits / count, z / count",
        "tests/test_results.py tests/test_measurements.py",
    ),
    # ---------------------------------------------------------------------------------------------- data and training
    Mutation(
        "label shifted", "timm_lowrank/data/batches.py",
        "self.labels[rows], strict=True)", "self.labels[rows.roll(1)], strict=True)",
        "tests/test_batches.py tests/test_training_run.py",
    ),
    Mutation(
        "the same streamed order in every epoch", "timm_lowrank/data/order.py",
        "starts, begins, offset = self._sequence(epoch)", "starts, begins, offset = self._sequence(0)",
        "tests/test_batches.py",
    ),
    Mutation(
        "branches on one epoch early", "timm_lowrank/training/recipe.py",
        "epoch < recipe.pretrain_epochs:", "epoch + 1 < recipe.pretrain_epochs:",
        "tests/test_training_recipe.py tests/test_training_run.py",
    ),
    # --------------------------------------------------------------------------------------- checkpoints and publishing
    Mutation(
        "view of a branch not written", "timm_lowrank/checkpoint/branches.py",
        "            view=tap.view.kind,\n", "            view=FLATTEN.kind,\n",
        "tests/test_checkpoint.py tests/test_trainer.py",
    ),
    Mutation(
        "damaged weights accepted", "timm_lowrank/checkpoint/files.py",
        "    if actual != digest:\n", "    if not digest:\n",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "figure from the twin", "timm_lowrank/publish/record.py",
        "return _known(figure, self.title)", "return _known(figure, self.plain_title)",
        "tests/test_card.py",
    ),
    Mutation(
        "weights of a listed checkpoint not compared", "timm_lowrank/checkpoint/loading.py",
        "else _Found(repo_id, here, None, one.sha256)", "else _Found(repo_id, here, None, None)",
        "tests/test_listed_checkpoints.py",
    ),
    Mutation(
        "right answers not compared with the accuracy of the run", "timm_lowrank/publish/checkpoints.py",
        "not low <= clean.value <= high", "not 0 <= clean.value <= 1",
        "tests/test_listed_checkpoints.py",
    ),
    Mutation(
        "paths in keys published", "timm_lowrank/publish/paths.py",
        "_cleaned(key, renamed) if isinstance(key, str) else key for key in value", "key for key in value",
        "tests/test_card.py",
    ),
    Mutation(
        "licence of pretrained weights ignored", "timm_lowrank/publish/record.py",
        "        if self.origin is None:\n            return LICENSE", "        if True:\n            return LICENSE",
        "tests/test_hub_scripts.py",
    ),
    Mutation(
        "a file is written without its lock", "timm_lowrank/files.py",
        "fcntl.lockf(file, fcntl.LOCK_EX)\n                # Whoever", "pass\n                # Whoever",
        "tests/test_files.py",
    ),
    # ------------------------------------------------------------------------------------------ the paper beside ours
    Mutation(
        "kept runs are averaged with other trainings", "timm_lowrank/reproduce/kept.py",
        "and not any(alike(run, other) for other in beside)", "and not any(beside)",
        "tests/test_reproduce.py",
    ),
    Mutation(
        "kept runs are averaged with those of other settings", "timm_lowrank/reproduce/kept.py",
        "return not changed_settings(one, two)", "return True",
        "tests/test_reproduce.py",
    ),
    Mutation(
        "a kept seed takes the bound of another", "timm_lowrank/reproduce/build.py",
        "unmeasured = () if beyond is None else tuple(seed for seed in seeds if seed not in known)", "unmeasured = ()",
        "tests/test_reproduce.py",
    ),
    Mutation(
        "black boxes from anywhere", "timm_lowrank/reproduce/runs.py",
        "return weights != self.twin", "return False",
        "tests/test_reproduce.py",
    ),
    Mutation(
        "layers of whatever stood beside", "timm_lowrank/reproduce/runs.py",
        "layers = own if len(own) > 1 else layers", "layers = layers",
        "tests/test_reproduce.py",
    ),
    # ------------------------------------------------------------------------------------------------- the comparators
    Mutation(
        "bottleneck beside the activations", "timm_lowrank/comparators.py",
        "return functional.linear(functional.linear(rows, self.factor.T), self.factor)",
        "return rows + functional.linear(functional.linear(rows, self.factor.T), self.factor)",
        "tests/test_comparators.py",
    ),
    Mutation(
        "a saved bottleneck forgets its image size", "timm_lowrank/comparators.py",
        "\"example_size\": list(images.shape[1:])}",
        "\"example_size\": None}",
        "tests/test_comparators.py",
    ),
    Mutation(
        "stable rank one too large", "timm_lowrank/comparators.py",
        "math.sqrt(stable_rank - 1)",
        "math.sqrt(stable_rank)",
        "tests/test_comparators.py",
    ),
    Mutation(
        "singular vectors of the last step but one", "timm_lowrank/comparators.py",
        "cast(SpectralNormalized, module[0]).settle(",
        "cast(SpectralNormalized, module[0])._reshape_weight_to_matrix(",
        "tests/test_comparators.py",
    ),
    Mutation(
        "snip by the gradient alone", "timm_lowrank/comparators.py",
        "(layer.weight.detach() * gradients[name].to(layer.weight.device)).abs()",
        "gradients[name].to(layer.weight.device).abs()",
        "tests/test_comparators.py",
    ),
    Mutation(
        "snip on each process for itself", "timm_lowrank/comparators.py",
        "start.mean_over_processes(one)",
        "one",
        "tests/test_comparators.py",
    ),
    Mutation(
        "masks dropped in training", "timm_lowrank/comparators.py",
        "return weight * self.kept",
        "return weight if self.training else weight * self.kept",
        "tests/test_comparators.py",
    ),
    Mutation(
        "nested classifiers see the last features", "timm_lowrank/comparators.py",
        "features[:, : head.in_features]",
        "features[:, -head.in_features :]",
        "tests/test_comparators.py",
    ),
    Mutation(
        "nested losses dropped", "timm_lowrank/training/loop.py",
        "loss = task_loss + extra",
        "loss = task_loss",
        "tests/test_comparators.py",
    ),
    Mutation(
        "initial weights ignored", "timm_lowrank/training/state.py",
        "        network.load_state_dict(load_file(path))",
        "        load_file(path)",
        "tests/test_comparators.py",
    ),
)  # fmt: skip


def caught(mutation: Mutation, copy: Path) -> tuple[bool, str]:
    """Whether the tests fail on the mutated copy, and the line in which pytest says so."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        sys.exit(f"{mutation.name}: its text stands {text.count(mutation.old)} times in {mutation.file}, not once")
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1 and bool(failed), (failed or done.stdout.splitlines() or [done.stderr])[-1]


def main() -> None:
    """Runs the mutations that are named, or all, and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}: see --list")
    chosen = [mutation for mutation in MUTATIONS if not given.names or mutation.name in given.names]
    if given.list:
        print("\n".join(f"{mutation.name:<40} {mutation.file}" for mutation in chosen))
        return
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
        for mutation in chosen:
            began = time.perf_counter()
            is_caught, line = caught(mutation, copy)
            survived += [] if is_caught else [mutation.name]
            verdict = "caught" if is_caught else "SURVIVED"
            print(f"{verdict:<9} {mutation.name:<40} {time.perf_counter() - began:4.0f} s  {line}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
