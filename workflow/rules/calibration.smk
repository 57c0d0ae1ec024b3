"""Calibration databases, from COCO, own files or the embedded sample."""


rule fetch:
    """Fetch what a COCO dataset lacks: its annotations, then the images that it draws."""
    output:
        paths.fetched("{dataset}"),
    log:
        paths.log("fetch", "{dataset}"),
    benchmark:
        paths.benchmark("fetch", "{dataset}")
    # Compute nodes often have no network.
    localrule: True
    conda:
        environment("cpu")
    resources:
        # `--resources connections=8` limits all fetching together; how many there are is no
        # reason to fetch again.
        connections=connections,
    params:
        settings=slice_of(settings.fetch_settings, "dataset"),
    shell:
        PYTHON
        + " -m layersense fetch {wildcards.dataset:q} --settings {params.settings:q}"
        " --connections {resources.connections:q} --out {output:q} > {log:q} 2>&1"


rule dataset:
    """Draw the rows of a dataset and check every image that they need."""
    input:
        listed_in,
    output:
        paths.calibration("{dataset}"),
    log:
        paths.log("dataset", "{dataset}"),
    benchmark:
        paths.benchmark("dataset", "{dataset}")
    conda:
        environment("report")
    params:
        settings=slice_of(settings.dataset_settings, "dataset"),
        version=f"database-{DATABASE_VERSION}",
    shell:
        PYTHON
        + " -m layersense dataset {wildcards.dataset:q} --settings {params.settings:q}"
        " --out {output:q} > {log:q} 2>&1"
