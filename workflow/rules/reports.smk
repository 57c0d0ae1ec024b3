"""Reports: pages and figures for one scheme, pages for all side by side."""


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
            category=category,
            subcategory="{run}",
            labels=labels("Markdown report"),
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


rule scripts:
    """The chart library, bundled once for all pages."""
    input:
        pins=str(WORKFLOW.parent / "envs" / "report.txt"),
    output:
        paths.scripts(),
    log:
        paths.log("scripts"),
    benchmark:
        paths.benchmark("scripts")
    localrule: True
    conda:
        environment("report")
    shell:
        f"{PYTHON} -m layersense scripts --out {{output:q}} > {{log:q}} 2>&1"


rule page:
    """The HTML report of one scheme, and its figures."""
    input:
        **render_inputs("report.html.j2", "page.css", "page.js", "report.js"),
        layers=paths.layers("{run}", "{scheme}"),
        frontier=paths.frontier("{run}", "{scheme}"),
        verification=verification_of_run,
        scripts=paths.scripts(),
    output:
        page=report(
            paths.report_page("{run}", "{scheme}"),
            caption="../templates/captions/page.rst",
            category=category,
            subcategory="{run}",
            labels=labels("interactive report"),
        ),
        depth=report(
            paths.figure("{run}", "{scheme}", "depth.svg"),
            caption="../templates/captions/depth.rst",
            category=category,
            subcategory="{run}",
            labels=labels("sensitivity along depth"),
        ),
        heatmap=report(
            paths.figure("{run}", "{scheme}", "heatmap.svg"),
            caption="../templates/captions/heatmap.rst",
            category=category,
            subcategory="{run}",
            labels=labels("heat map"),
        ),
        frontier=report(
            figure("frontier.svg")("{run}", "{scheme}"),
            caption="../templates/captions/frontier.rst",
            category=category,
            subcategory="{run}",
            labels=labels("frontier"),
        ),
        png=[figure(name)("{run}", "{scheme}") for name in FIGURES if "png" in name],
    log:
        paths.log("page", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("page", "{run}", "{scheme}")
    # As its Markdown sibling.
    localrule: True
    conda:
        environment("report")
    params:
        settings=slice_of(settings.report_settings),
        figures=paths.figure("{run}", "{scheme}", ""),
    shell:
        PYTHON
        + " -m layersense page {input.verification:q} --layers {input.layers:q} --frontier {input.frontier:q}"
        " --settings {params.settings:q} --template {input.template:q} --scripts {input.scripts:q} --out {output.page:q}"
        " --figures {params.figures:q} > {log:q} 2>&1"


rule scatter:
    """The figure of predicted against measured damage, of a verified run alone."""
    input:
        modules=render_modules(),
        layers=paths.layers("{run}", "{scheme}"),
        verification=paths.verification_table("{run}"),
    output:
        svg=report(
            figure("measured.svg")("{run}", "{scheme}"),
            caption="../templates/captions/measured.rst",
            category=category,
            subcategory="{run}",
            labels=labels("predicted against measured"),
        ),
        png=figure("measured.png")("{run}", "{scheme}"),
    log:
        paths.log("scatter", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("scatter", "{run}", "{scheme}")
    # As the page, which shows the same.
    localrule: True
    conda:
        environment("report")
    params:
        figures=paths.figure("{run}", "{scheme}", ""),
    shell:
        PYTHON
        + " -m layersense scatter --layers {input.layers:q} --verification {input.verification:q}"
        " --figures {params.figures:q} > {log:q} 2>&1"


rule index:
    """All runs and schemes side by side, any two of them compared."""
    input:
        **render_inputs("index.html.j2", "page.css", "page.js", "index.js"),
        runs=paths.runs(),
        sensitivity=paths.sensitivity(),
        verifications=verifications(),
    output:
        report(
            paths.index(),
            caption="../templates/captions/index.rst",
            category="All runs",
            labels={"page": "all runs, compared"},
        ),
    log:
        paths.log("index"),
    benchmark:
        paths.benchmark("index")
    localrule: True
    conda:
        environment("report")
    params:
        settings=slice_of(settings.report_settings),
    shell:
        PYTHON
        + " -m layersense index {input.verifications:q} --runs {input.runs:q} --sensitivity {input.sensitivity:q}"
        " --settings {params.settings:q} --template {input.template:q} --out {output:q}"
        " > {log:q} 2>&1"


rule summary:
    """All runs and schemes side by side."""
    input:
        **render_inputs("summary.md.j2"),
        runs=paths.runs(),
        sensitivity=paths.sensitivity(),
        verifications=verifications(),
    output:
        report(
            paths.summary(),
            caption="../templates/captions/summary.rst",
            category="All runs",
            labels={"page": "summary, Markdown"},
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
        + " -m layersense summary {input.verifications:q} --runs {input.runs:q} --sensitivity {input.sensitivity:q}"
        " --settings {params.settings:q} --template {input.template:q} --out {output:q}"
        " > {log:q} 2>&1"
