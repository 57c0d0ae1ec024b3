"""Reports: Markdown for one scheme and for all side by side."""


rule report:
    """The report of one scheme."""
    input:
        **render_inputs("layer-sensitivity-report.md.j2"),
        manifest=paths.manifest("{run}", "{scheme}"),
        layers=paths.layers("{run}", "{scheme}"),
        frontier=paths.frontier("{run}", "{scheme}"),
        verification=verification_of_run,
    output:
        report(
            paths.report_markdown("{run}", "{scheme}"),
            caption="../templates/captions/report.rst",
            category="{run}",
            labels={"scheme": "{scheme}", "page": "report"},
        ),
    log:
        paths.log("report", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("report", "{run}", "{scheme}")
    # Grouped with its scheme's jobs, it would wait for a verification that waits for these.
    localrule: True
    conda:
        environment("report")
    params:
        settings=slice_of(settings.report_settings),
    shell:
        PYTHON
        + " -m layersense report {input.verification:q} --manifest {input.manifest:q}"
        " --layers {input.layers:q} --frontier {input.frontier:q}"
        " --settings {params.settings:q} --template {input.template:q} --out {output:q}"
        " > {log:q} 2>&1"


rule summary:
    """All runs and schemes side by side."""
    input:
        **render_inputs("summary.md.j2"),
        runs=paths.runs(),
        sensitivity=paths.sensitivity(),
    output:
        report(
            paths.summary(),
            caption="../templates/captions/summary.rst",
            category="All runs",
            labels={"page": "summary"},
        ),
    log:
        paths.log("summary"),
    benchmark:
        paths.benchmark("summary")
    # Seconds, over what all jobs wrote: not worth a place in a queue.
    localrule: True
    conda:
        environment("report")
    params:
        settings=slice_of(settings.report_settings),
    shell:
        PYTHON
        + " -m layersense summary --runs {input.runs:q} --sensitivity {input.sensitivity:q}"
        " --settings {params.settings:q} --template {input.template:q} --out {output:q}"
        " > {log:q} 2>&1"
