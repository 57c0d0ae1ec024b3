"""Time the workflow: an idle call, one report, a large dry run, and the demo by phase.

    python benchmarks/workflow.py [idle] [report] [dry-run] [demo]

Without a name, all of them. They run in a copy of the repository in a temporary folder, whose demo
is made first; nothing of the repository itself changes. Prints Markdown.
"""

import csv
import statistics
import sys
from pathlib import Path

import yaml
from studies import large_config, machine, measured, repository_copy
from studies import snakemake as command

NAMES = ("idle", "report", "dry-run", "demo")
REPORT = Path("results/demo.captions/fp8_language/layer-sensitivity-report.md")
TEMPLATE = Path("workflow/templates/layer-sensitivity-report.md.j2")
CORES = 2
MODELS, SCHEMES = 50, 16


def main() -> None:
    names = sys.argv[1:] or NAMES
    if unknown := set(names) - set(NAMES):
        sys.exit(f"{', '.join(sorted(unknown))}: expected {', '.join(NAMES)}")
    print(machine(), end="\n\n")
    with repository_copy() as root:
        rows = []
        if "dry-run" in names:
            rows.append(dry_run(root))
        if set(names) - {"dry-run"}:
            # The first call of all compiles bytecode, as after a clone.
            seconds, _ = snakemake(root)
            if "demo" in names:
                rows.append((f"`make demo` after the install, {CORES} cores", [seconds], 240))
            if "idle" in names:
                rows.append(idle(root))
            if "report" in names:
                rows.append(one_report(root))
        print("| what | seconds, median | fastest to slowest | calls | target |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for what, seconds_of, target in rows:
            spread = f"{min(seconds_of):.1f} to {max(seconds_of):.1f}"
            median = statistics.median(seconds_of)
            print(f"| {what} | {median:.1f} | {spread} | {len(seconds_of)} | ≤ {target} |")
        if "demo" in names:
            print()
            print_phases(root / "results" / "benchmarks")


Row = tuple[str, list[float], int]


def idle(root: Path) -> Row:
    times = []
    for _ in range(5):
        seconds, output = snakemake(root)
        assert "Nothing to be done" in output
        times.append(seconds)
    return "nothing to do: `snakemake` after the demo", times, 6


def one_report(root: Path) -> Row:
    template = root / TEMPLATE
    times = []
    for number in range(5):
        template.write_text(template.read_text() + f"\nEdit {number}.\n")
        seconds, output = snakemake(root, str(REPORT))
        assert "1 of 1 steps (100%) done" in output, output
        assert f"Edit {number}." in (root / REPORT).read_text()
        times.append(seconds)
    return "one report after its template was edited", times, 6


def dry_run(root: Path) -> Row:
    (root / "large.yaml").write_text(yaml.safe_dump(large_config(MODELS, SCHEMES)))
    times = []
    for _ in range(3):
        arguments = ["--configfile", "large.yaml", "--resources", "gpu=1", "--dry-run"]
        seconds, output = snakemake(root, *arguments)
        solve = next(line.split() for line in output.splitlines() if line.startswith("solve "))
        assert solve == ["solve", str(MODELS * SCHEMES)]
        times.append(seconds)
    return f"dry run of {MODELS} models × {SCHEMES} schemes", times, 20


def snakemake(root: Path, *arguments: str) -> tuple[float, str]:
    """Run Snakemake in the copy; return its wall seconds and what it printed."""
    done = measured(command(*arguments, cores=CORES), root)
    return done.seconds, done.output


def print_phases(folder: Path) -> None:
    """Print wall time and peak memory of the demo's jobs, from Snakemake's own benchmarks."""
    print("| phase of the demo | jobs | seconds, sum | longest | peak RSS, MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    phases: dict[str, list[tuple[float, float]]] = {}
    for file in sorted(folder.rglob("*.tsv"), key=lambda file: file.stat().st_mtime_ns):
        phase = file.relative_to(folder).with_suffix("").parts[0]
        with file.open() as lines:
            (row,) = csv.DictReader(lines, delimiter="\t")
        # Snakemake samples memory; a job shorter than its interval has none.
        peak = 0.0 if row["max_rss"] in ("NA", "-") else float(row["max_rss"])
        phases.setdefault(phase, []).append((float(row["s"]), peak))
    for phase, jobs in phases.items():
        seconds = [job[0] for job in jobs]
        print(
            f"| {phase} | {len(jobs)} | {sum(seconds):.1f} | {max(seconds):.1f} "
            f"| {max(job[1] for job in jobs):.0f} |"
        )


if __name__ == "__main__":
    main()
