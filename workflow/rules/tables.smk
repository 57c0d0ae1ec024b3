"""Tidy Parquet tables, of one scheme and of all."""


rule layers:
    """The table of one scheme: a row for each layer group and format."""
    input:
        manifest=paths.manifest("{run}", "{scheme}"),
    output:
        paths.layers("{run}", "{scheme}"),
    log:
        paths.log("layers", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("layers", "{run}", "{scheme}")
    conda:
        environment("report")
    params:
        version=f"table-{TABLE_VERSION}",
    shell:
        PYTHON + " -m layersense table --manifest {input.manifest:q} --out {output:q}"
        " > {log:q} 2>&1"


rule summaries:
    """All layer tables in one, and a table with a row for each run and scheme."""
    input:
        manifests=per_scheme(paths.manifest),
        layers=per_scheme(paths.layers),
    output:
        sensitivity=paths.sensitivity(),
        runs=paths.runs(),
    log:
        paths.log("summaries"),
    benchmark:
        paths.benchmark("summaries")
    # Seconds, over what all jobs wrote: not worth a place in a queue.
    localrule: True
    conda:
        environment("report")
    params:
        version=f"table-{TABLE_VERSION}",
    shell:
        PYTHON
        + " -m layersense tables {input.manifests:q} --sensitivity {output.sensitivity:q}"
        " --runs {output.runs:q} > {log:q} 2>&1"
