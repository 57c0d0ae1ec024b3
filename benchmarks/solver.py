"""Solve problems of rising size and print seconds, peak memory and proven gap.

Run: ``python benchmarks/solver.py``
"""

import resource
import time

import numpy as np

from layersense.recipes.solver import Problem, corners, solve


def problem(n_groups: int, n_options: int, seed: int = 0) -> Problem:
    """Layers of a few sizes; scores over nine decades and more, lower with more bits."""
    random = np.random.default_rng(seed)
    weights = random.choice([0.5, 1.0, 2.75, 10.75], size=n_groups) * 2**20
    bits = np.append(np.sort(random.uniform(3, 15, size=n_options - 1)), 16.0)
    noise = random.uniform(0.3, 3, size=(n_groups, n_options))
    damage = 10 ** random.uniform(-6, 3, size=(n_groups, 1)) * 4.0 ** (4 - bits) * noise
    damage[:, -1] = 0
    return Problem(np.minimum.accumulate(damage, axis=1), weights[:, None] * bits / 16)


def alike(n_groups: int, seed: int = 0) -> Problem:
    """Layers that differ little and a large head, under 20 pairs of which many cost the same."""
    random = np.random.default_rng(seed)
    weights = random.choice([1.0, 3.0, 5.0, 20.0], size=n_groups) * 2**20
    weights[-1] = 2 * n_groups * 2**20
    bits = np.repeat([4.125, 4.5, 8.0, 16.0], [5, 5, 10, 1])
    pairs = 10 ** random.uniform(-1, 1, size=len(bits)) * 4.0**-bits
    pairs[-1] = 0
    noise = random.normal(1, 0.03, size=(n_groups, len(bits)))
    return Problem(weights[:, None] * pairs * noise, weights[:, None] * bits / 16)


def main() -> None:
    print("| groups × formats | objective | seconds | peak GB | gap |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, instance in (
        ("300 × 3", problem(300, 3)),
        ("3,000 × 16", problem(3_000, 16)),
        ("60,000 × 16", problem(60_000, 16)),
        ("300 alike × 21", alike(300)),
        ("3,000 alike × 21", alike(3_000)),
    ):
        for objective in ("sum", "max"):
            start = time.perf_counter()
            solution = solve(instance, 0.35 * instance.costs[:, -1].sum(), objective)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"| {name} | {objective} | {seconds:.2f} | {peak:.2f} | {solution.gap:.1e} |")
        start = time.perf_counter()
        points = corners(instance, 64)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"| {name} | frontier of {len(points)} | {seconds:.2f} "
            f"| {peak:.2f} | {max(point.gap for point in points):.1e} |"
        )
    against_modelopt()


def against_modelopt() -> None:
    """Compare with ModelOpt's own solver (PuLP, CBC), driven with the bounds that it tries."""
    try:
        from modelopt.torch.opt.searcher import LPS
    except ImportError as error:
        print(f"\nModelOpt's solver is not installed: {error}")
        return
    print("\n| groups | formats | ours, s | ModelOpt's, s | its damage / ours |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for n_groups, n_options in ((40, 3), (300, 3), (300, 8), (1_000, 8), (3_000, 16)):
        instance = problem(n_groups, n_options, seed=1)
        budget = 1.3 * instance.costs.min(axis=1).sum()
        start = time.perf_counter()
        ours = solve(instance, budget)
        own_seconds = time.perf_counter() - start
        start = time.perf_counter()
        choice, status = [], ""
        for lower in (None, 0.99, 0.90):
            choice, status = LPS(
                name="AutoQuantize",
                constraints={"size": (lower * budget if lower else lower, budget)},
                constraints_to_candidate_costs={"size": instance.costs.tolist()},
                candidate_scores=instance.scores.tolist(),
            )()
            if status == "Optimal":
                break
        seconds = time.perf_counter() - start
        theirs = instance.scores[np.arange(n_groups), np.array(choice)].sum()
        within = instance.costs[np.arange(n_groups), np.array(choice)].sum() <= budget * (1 + 1e-9)
        ratio = f"{theirs / ours.score:.6f}" if within and status == "Optimal" else "none found"
        print(f"| {n_groups:,} | {n_options} | {own_seconds:.2f} | {seconds:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
