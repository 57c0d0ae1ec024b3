"""Tidy Parquet tables, of one scheme and of all."""


rule layers:
    """The table of one scheme: a row for each layer group and format."""
    input:
        manifest=paths.manifest("{run}", "{scheme}"),
    output:
        report(
            paths.layers("{run}", "{scheme}"),
            caption="../templates/captions/layers-table.rst",
            category=category,
            subcategory="{run}",
            labels=labels("table of layer groups, Parquet"),
        ),
    log:
        paths.log("layers", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("layers", "{run}", "{scheme}")
    conda:
        environment("report")
    params:
        version=f"table-{TABLE_VERSION}",
    shell:
        PYTHON
        + " -m layersense table --manifest {input.manifest:q} --out {output:q} > {log:q} 2>&1"


rule imported:
    """A manifest of another implementation, in our own form, and its table."""
    input:
        lambda wildcards: CONFIG.manifests[wildcards.imported].file,
    output:
        manifest=paths.imported("{imported}"),
        layers=paths.imported_layers("{imported}"),
    log:
        paths.log("imported", "{imported}"),
    benchmark:
        paths.benchmark("imported", "{imported}")
    localrule: True
    conda:
        environment("report")
    params:
        settings=slice_of(settings.import_settings, "imported"),
        version=f"table-{TABLE_VERSION}",
    shell:
        PYTHON
        + " -m layersense imported {wildcards.imported:q} --settings {params.settings:q}"
        " --file {input:q} --out {output.manifest:q} > {log:q} 2>&1"


rule summaries:
    """All layer tables in one, and a table with a row for each run and scheme."""
    input:
        manifests=[
            *per_scheme(paths.manifest),
            *map(paths.imported, CONFIG.manifests),
        ],
        layers=[
            *per_scheme(paths.layers),
            *map(paths.imported_layers, CONFIG.manifests),
        ],
    output:
        sensitivity=report(
            paths.sensitivity(),
            caption="../templates/captions/sensitivity-table.rst",
            category="All runs",
            labels={"page": "table of all layer groups, Parquet"},
        ),
        runs=report(
            paths.runs(),
            caption="../templates/captions/runs-table.rst",
            category="All runs",
            labels={"page": "table of all runs, Parquet"},
        ),
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


rule verification:
    """The table of a run's measured damage beside the predicted."""
    input:
        measured=measured_verification,
        manifests=manifests_of_run,
    output:
        report(
            paths.verification_table("{run}"),
            caption="../templates/captions/verification-table.rst",
            category=category,
            subcategory="{run}",
            labels=labels("table of measured damage, Parquet"),
        ),
    log:
        paths.log("verification", "{run}"),
    benchmark:
        paths.benchmark("verification", "{run}")
    # Seconds, over what one job measured and all schemes of a run predict.
    localrule: True
    conda:
        environment("report")
    params:
        settings=slice_of(settings.verify_settings, "run"),
        version=f"verification-{VERIFICATION_TABLE_VERSION}",
    shell:
        PYTHON + " -m layersense verification {input.manifests:q}"
        " --measured {input.measured:q} --settings {params.settings:q} --out {output:q}"
        " > {log:q} 2>&1"
