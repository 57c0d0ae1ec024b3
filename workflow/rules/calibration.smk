"""Calibration databases, from COCO, own files or the embedded sample."""


rule dataset:
    """Draw the rows of a dataset and check every image that they need."""
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
